"""The passkey task, the bundled plans, and the demo itself on the real model."""

import pytest

from zigzag_ext.cli import demo, timing
from zigzag_ext.cli.commands import _verdict
from zigzag_ext.study import loading
from zigzag_ext.study.evaluate.passkey import build_prompt, is_hit

TOKENS = 2000


class Words:
    """A tokenizer that makes every word a token."""

    def __call__(self, text):
        return {"input_ids": text.split()}


@pytest.mark.parametrize("tokens", [100, 1000, 1001, 1017, 4000])
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompt_is_as_long_as_it_may_be_and_hides_the_key_where_asked(tokens, depth):
    prompt = build_prompt(Words(), tokens, depth, seed=3)
    words = prompt.text.split()
    assert tokens - 20 < len(words) == prompt.tokens <= tokens
    places = [i for i, word in enumerate(words) if prompt.key in word]
    assert len(places) == 2 and len(prompt.key) == 5
    assert abs(places[0] - depth * tokens) < 65  # the task before the filler and the question after it take 51 words


def test_prompts_are_reproducible_and_differ_by_seed():
    assert build_prompt(Words(), 500, 0.5, 1) == build_prompt(Words(), 500, 0.5, 1)
    assert len({build_prompt(Words(), 500, 0.5, seed).key for seed in range(20)}) == 20


@pytest.mark.parametrize("tokens,depth,named", [(20, 0.5, "20"), (500, 1.5, "1.5"), (500, -0.1, "-0.1")])
def test_impossible_prompts_are_refused(tokens, depth, named):
    with pytest.raises(ValueError, match=named):
        build_prompt(Words(), tokens, depth)


def test_only_the_key_is_a_hit():
    prompt = build_prompt(Words(), 500, 0.5, 0)
    other = str(int(prompt.key) ^ 1)
    for answer in (f" {prompt.key}. The pass key", f"\n{prompt.key}", f"the number {prompt.key}"):
        assert is_hit(prompt, answer)
    for answer in ("", "a magical item", prompt.key[:4], prompt.key + "7", f" {other}", f" {other} or {prompt.key}"):
        assert not is_hit(prompt, answer)


def test_both_bundled_plans_take_the_same_memory():
    plans = demo.demo_plans()
    full, good, bad = plans.values()
    assert full.retrieval_ratio == 1
    assert len(good.streaming_layers) == len(bad.streaming_layers) > 0 and good.kinds != bad.kinds
    assert (good.sink, good.window, good.num_layers) == (bad.sink, bad.window, bad.num_layers)


def test_special_tokens_are_those_of_the_file(demo_folder):
    """In the .gguf file, and in what it is converted into; some releases of transformers mix them up."""
    for source in (demo._installed_gguf(), demo_folder):
        tokenizer = loading._tokenizer(*loading._locate(str(source)))
        named = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token)
        assert named == ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end|>")
        assert tokenizer.convert_tokens_to_ids(list(named)) == [1, 2, 0, 2]


@pytest.fixture(scope="module")
def passkey(demo_model):
    """One prompt of TOKENS tokens, as the demo has it."""
    [prompt] = demo.passkey_prompts(demo_model[1], TOKENS, [0.25], [0])
    return prompt


@pytest.fixture(scope="module")
def outcomes(demo_model, passkey):
    return demo.run([passkey], *demo_model)


@pytest.mark.slow
def test_demo_on_the_real_model(outcomes):
    """What the README promises: with at most 60% of the KV memory the good plan finds the key, and the bad one does not."""
    full, good, bad = outcomes
    tokens = full.generations[0].prompt_tokens + demo.ANSWER_TOKENS
    per_token = 2 * 4 * 3 * 64  # bytes: K and V, float32, 3 KV heads of 64
    assert full.hits == (True,), full.generations[0].text
    assert good.hits == (True,), good.generations[0].text
    assert bad.hits == (False,), bad.generations[0].text
    growth = 256 * per_token  # a retrieval layer takes memory for some tokens to come
    assert 0 <= full.cache_bytes - 30 * tokens * per_token <= 30 * growth
    kept = len(good.plan.retrieval_layers) * tokens + len(good.plan.streaming_layers) * (good.plan.sink + good.plan.window)
    assert good.cache_bytes == bad.cache_bytes <= 0.6 * full.cache_bytes
    assert 0 <= good.cache_bytes - kept * per_token <= len(good.plan.retrieval_layers) * growth
    assert _verdict(outcomes)[1]


@pytest.mark.slow
def test_the_good_plan_finds_the_key_in_compiled_steps(demo_model, passkey, outcomes):
    _, good, _ = outcomes
    compiled = timing.generate(*demo_model, passkey.text, good.plan, demo.ANSWER_TOKENS, compile=True)
    assert is_hit(passkey, compiled.text) and compiled.text == good.generations[0].text
