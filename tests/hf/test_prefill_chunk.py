"""enable(prefill_chunk=...): the tokens of one shot, in every family and every turn, without logits or memory for the rest."""

import pytest
import torch
from tiny_models import FAMILIES, generate, new_model, padded_prompt, prompt, tiny_model

import zigzag_ext as zz
from zigzag_ext.hf import chunking

PLAN = zz.Plan(["streaming", "retrieval", "streaming", "streaming"], sink=4, window=16)


@pytest.fixture
def bodies(monkeypatch):
    """Token counts of the forwards that computed no logits."""
    counts, run = [], chunking._run_body
    monkeypatch.setattr(chunking, "_run_body", lambda *args: (counts.append(args[-1]), run(*args))[1])
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_one_shot(family, bodies):
    model, batch = tiny_model(family), padded_prompt([61, 40, 3])
    with zz.zigzag(model, PLAN):
        expected = generate(model, 4, **batch)
    with zz.zigzag(model, PLAN, prefill_chunk=25):
        assert generate(model, 4, **batch).equal(expected) and bodies == [25, 25]


@pytest.mark.parametrize("lengths", [[31], [31, 9]], ids=["single", "left_padded"])
def test_every_turn_of_a_conversation(lengths, bodies):
    model, batch = tiny_model(), padded_prompt(lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    caches = [zz.ZigzagCache(model.config, PLAN, max_len=160) for _ in range(2)]
    for turn in range(3):
        with zz.zigzag(model, PLAN):
            expected = generate(model, 20, ids, attention_mask=mask, past_key_values=caches[0])
        with zz.zigzag(model, PLAN, prefill_chunk=8):
            answer = generate(model, 20, ids, attention_mask=mask, past_key_values=caches[1])
        assert answer.equal(expected), f"turn {turn}"
        ids = torch.cat([ids, answer, prompt(11, len(lengths), seed=turn + 7)], 1)
        mask = torch.cat([mask, mask.new_ones(len(lengths), 31)], 1)
    assert bodies == [8, 8, 8] + [8] + [8], "31 tokens, then twice 11 and the last one of the answer"


@pytest.mark.parametrize(
    "tokens,keep,expected",
    [(40, 1, [16, 16]), (48, 1, [16, 16]), (49, 1, [16] * 3), (16, 1, []), (40, 20, [16, 4]), (40, 40, [])],
)
def test_where_a_prompt_is_cut(tokens, keep, expected, bodies):
    model, ids = tiny_model(), prompt(tokens, 2)
    with torch.no_grad(), zz.zigzag(model, PLAN, prefill_chunk=16):
        chunked = model(ids, logits_to_keep=keep).logits
        assert bodies == expected
        whole = model(ids).logits
        assert bodies == expected, "a forward that wants all logits is not cut"
    assert chunked.shape == (2, keep, whole.shape[2])
    torch.testing.assert_close(chunked, whole[:, -keep:], atol=1e-4, rtol=1e-4)


def test_what_is_not_cut(bodies):
    model, ids = tiny_model(), prompt(40)
    with torch.no_grad(), zz.zigzag(model, PLAN, prefill_chunk=16):
        model(ids, logits_to_keep=1, use_cache=False)
        model(ids, logits_to_keep=1, output_hidden_states=True)
        model(ids, labels=ids, logits_to_keep=0)
        assert not bodies
        embeds = model.get_input_embeddings()(ids)
        chunked = model(inputs_embeds=embeds, position_ids=torch.arange(40)[None], logits_to_keep=1).logits
        assert bodies == [16, 16]
        torch.testing.assert_close(chunked, model(ids, use_cache=False, logits_to_keep=1).logits, atol=1e-4, rtol=1e-4)


def test_a_prompt_that_does_not_fit_raises_before_anything_is_written():
    model, cache = tiny_model(), zz.ZigzagCache(tiny_model().config, PLAN, max_len=50)
    with zz.zigzag(model, PLAN, prefill_chunk=16):
        with pytest.raises(RuntimeError, match="max_len is 50 tokens, this forward needs 60 .0 are held"):
            generate(model, 1, prompt(60), past_key_values=cache)
        assert cache.get_seq_length() == 0 and cache.memory_bytes() == 0
        generate(model, 1, prompt(49), past_key_values=cache)


def test_a_failure_in_a_chunk_leaves_a_cache_that_says_so():
    model = new_model("llama")
    cache, calls = zz.ZigzagCache(model.config, PLAN), []

    def fail_in_second_chunk(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(fail_in_second_chunk)
    with zz.zigzag(model, PLAN, prefill_chunk=16):
        with pytest.raises(KeyboardInterrupt):
            generate(model, 1, prompt(60), past_key_values=cache)
        hook.remove()
        with pytest.raises(RuntimeError, match="failed half-way"):
            generate(model, 1, prompt(60), past_key_values=cache)
        cache.reset()
        generate(model, 1, prompt(60), past_key_values=cache)


def test_misuse_raises():
    model = tiny_model()
    for wrong, error, message in [
        (0, ValueError, "prefill_chunk must be at least 1 token, got 0"),
        ("all", ValueError, "prefill_chunk must be a number of tokens, 'auto' or None; got 'all'"),
        (8.5, TypeError, "prefill_chunk must be an integer number of tokens"),
    ]:
        with pytest.raises(error, match=message):
            zz.enable(model, PLAN, prefill_chunk=wrong)
    with pytest.raises(ValueError, match="LlamaModel has no body of its own"):
        zz.enable(model.model, PLAN, prefill_chunk=16)
    with (
        torch.no_grad(),
        zz.zigzag(model, PLAN, prefill_chunk=16),
        pytest.raises(ValueError, match="cannot cut .* position_bias"),
    ):
        model(prompt(40), logits_to_keep=1, position_bias=torch.zeros(40))


@pytest.mark.parametrize(
    "free,batch,expected", [(64 << 30, 1, 8192), (64 << 30, 4, 2048), (64 << 30, 100, 256), (0, 1, 256), (40 << 20, 1, 2048)]
)
def test_automatic_size_follows_free_memory(free, batch, expected, monkeypatch, bodies):
    """The model of tiny_models: 4 bytes x (8 x 256 + 4 x 128) per token; buffers that are still to come count as taken."""
    monkeypatch.setattr(chunking, "free_bytes", lambda device: free + pending)
    model, cache = tiny_model(), zz.ZigzagCache(tiny_model().config, PLAN, max_len=3000)
    pending = batch * (3000 + 3 * 20) * 2 * 2 * 64 * 4
    cache.begin(batch, 3000)
    cache.end(failed=True)
    assert chunking.automatic_chunk(model, cache, batch) == expected


def test_auto_cuts_a_long_prompt(monkeypatch, bodies):
    monkeypatch.setattr(chunking, "free_bytes", lambda device: 0)
    model, ids = tiny_model(), prompt(600)
    with zz.zigzag(model, PLAN):
        expected = generate(model, 3, ids)
    with zz.zigzag(model, PLAN, prefill_chunk="auto"):
        assert generate(model, 3, ids).equal(expected) and bodies == [256, 256]
        assert generate(model, 3, prompt(256)).shape == (1, 3) and len(bodies) == 2


def test_free_memory_of_this_machine():
    assert 1 << 20 < chunking.free_bytes(torch.device("cpu")) < 1 << 50


def test_no_logits_for_the_chunks():
    """The head sees one token per generate() step, whatever the prompt."""
    model, seen = new_model("llama"), []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    with zz.zigzag(model, PLAN, prefill_chunk=16):
        generate(model, 3, prompt(100))
    assert seen == [1, 1, 1]


def test_duo_attention_reads_the_first_chunk_with_full_attention_and_depends_on_the_cut():
    model, ids = tiny_model(), prompt(100)

    def logits(plan, chunk, **options):
        with torch.no_grad(), zz.zigzag(model, plan, prefill_chunk=chunk), zz.prefill_options(**options):
            return model(ids, logits_to_keep=1).logits

    full = logits(zz.Plan(["retrieval"] * 4, sink=4, window=16), 100)
    torch.testing.assert_close(logits(PLAN, 100, duo_attention=True), full, atol=1e-4, rtol=1e-4)
    exact = [logits(PLAN, chunk) for chunk in (100, 30)]
    torch.testing.assert_close(*exact, atol=1e-4, rtol=1e-4)
    cut = logits(PLAN, 30, duo_attention=True)
    assert min((cut - other).abs().max() for other in (full, exact[0])) > 0.01
