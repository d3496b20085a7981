"""generate() and forward() on an enabled model: decoding strategies, caches over several calls, and what must not change."""

import copy

import pytest
import torch
from dense_oracle import dense_oracle
from tiny_models import NUM_LAYERS, generate, new_model, padded_prompt, prompt, tiny_model

import zigzag_ext as zz

SINK, WINDOW = 4, 16
MIXED = ["streaming", "retrieval", "streaming", "streaming"]
PLAN = zz.Plan(MIXED, sink=SINK, window=WINDOW)


@pytest.fixture
def model():
    model = tiny_model()
    with zz.zigzag(model, PLAN):
        yield model


def expected_tokens(model, new_tokens, input_ids, seed=None, **options):
    """The same call on a second model under dense masks."""
    twin = new_model(model.config.model_type)
    if seed is not None:
        torch.manual_seed(seed)
    with dense_oracle(twin, MIXED, SINK, WINDOW):
        return generate(twin, new_tokens, input_ids, **options)


@pytest.mark.parametrize("batch", [{"input_ids": prompt(50, 2)}, padded_prompt([50, 20])], ids=["even", "left_padded"])
def test_beam_search(model, batch):
    options = batch | {"num_beams": 3, "num_return_sequences": 2}
    assert generate(model, 40, **options).equal(expected_tokens(model, 40, **options))


def test_sampling_several_sequences(model):
    options = {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8, "top_k": 20}
    torch.manual_seed(5)
    tokens = generate(model, 40, prompt(30, 2), **options)
    assert tokens.equal(expected_tokens(model, 40, prompt(30, 2), seed=5, **options))
    assert len({tuple(row.tolist()) for row in tokens}) > 1


def test_without_a_cache(model):
    batch = padded_prompt([40, 12])
    assert generate(model, 6, **batch, use_cache=False).equal(expected_tokens(model, 6, **batch))


@pytest.mark.parametrize("lengths", [[31], [31, 9]], ids=["single", "left_padded"])
def test_several_turns_with_one_cache(model, lengths):
    batch, cache = padded_prompt(lengths), zz.ZigzagCache(model.config, PLAN, max_len=160)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for turn in range(3):
        answer = generate(model, 20, ids, attention_mask=mask, past_key_values=cache)
        assert answer.equal(expected_tokens(model, 20, ids, attention_mask=mask)), f"turn {turn}"
        ids = torch.cat([ids, answer, prompt(11, len(lengths), seed=turn + 7)], 1)
        mask = torch.cat([mask, mask.new_ones(len(lengths), 31)], 1)


def test_a_copied_cache_answers_two_questions_on_one_prefix(model):
    prefix, cache = prompt(45), zz.ZigzagCache(model.config, PLAN)
    with torch.no_grad():
        model(prefix, past_key_values=cache)
    for seed in (3, 4):
        ids = torch.cat([prefix, prompt(9, seed=seed)], 1)
        answer = generate(model, 12, ids, past_key_values=copy.deepcopy(cache))
        assert answer.equal(expected_tokens(model, 12, ids))
    assert cache.get_seq_length() == 45


def test_reset_and_reuse_also_with_another_batch(model):
    cache = zz.ZigzagCache(model.config, PLAN, max_len=100)
    for lengths in ([40], [40], [30, 8]):
        batch = padded_prompt(lengths, seed=len(lengths))
        assert generate(model, 30, **batch, past_key_values=cache).equal(expected_tokens(model, 30, **batch))
        cache.reset()
        assert cache.get_seq_length() == 0


def test_a_cache_outlives_inference_mode(model):
    cache, ids = zz.ZigzagCache(model.config, PLAN, max_len=100), prompt(20)
    with torch.inference_mode():
        first = generate(model, 5, ids, past_key_values=cache)
    longer = torch.cat([ids, first, prompt(3, seed=2)], 1)
    assert generate(model, 5, longer, past_key_values=cache).equal(expected_tokens(model, 5, longer))


def test_logits_of_a_plain_forward(model):
    batch = padded_prompt([40, 12])
    with torch.no_grad():
        logits = model(**batch).logits
        twin = new_model("llama")
        with dense_oracle(twin, MIXED, SINK, WINDOW):
            expected = twin(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=2e-4, rtol=1e-4)


def test_the_plan_of_the_cache_wins(model):
    ids, other = prompt(60), zz.Plan(["retrieval"] * NUM_LAYERS, sink=0, window=1)
    answer = generate(model, 12, ids, past_key_values=zz.ZigzagCache(model.config, other))
    assert answer.equal(generate(new_model("llama"), 12, ids))


def test_positional_arguments(model):
    batch = padded_prompt([20, 7])
    with torch.no_grad():
        by_name = model(**batch).logits
        assert model(batch["input_ids"], batch["attention_mask"]).logits.equal(by_name)


def test_ring_bytes_do_not_grow(model):
    plan, sizes = zz.Plan(["streaming"] * NUM_LAYERS, sink=SINK, window=WINDOW), []
    cache, ids = zz.ZigzagCache(model.config, plan), prompt(10)
    for new_tokens in (1, 490):
        answer = generate(model, new_tokens, ids, past_key_values=cache)
        ids = torch.cat([ids, answer], 1)
        sizes.append(cache.memory_bytes())
    assert cache.get_seq_length() == 500
    assert sizes == [NUM_LAYERS * 2 * 2 * (SINK + WINDOW) * 64 * 4] * 2  # layers, K and V, heads, slots, head_dim, bytes


def test_a_full_cache_raises_and_keeps_its_contents(model):
    cache, ids = zz.ZigzagCache(model.config, PLAN, max_len=30), prompt(28)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = copy.deepcopy(cache)
        with pytest.raises(RuntimeError, match="max_len is 30 tokens, this forward needs 31 .28 are held.*nothing was written"):
            model(prompt(3), past_key_values=cache)
        for layer, old in zip(cache.layers, before.layers, strict=True):
            # equal_nan: slots never written hold whatever memory held
            torch.testing.assert_close(layer.keys, old.keys, equal_nan=True, rtol=0, atol=0)
        assert cache.get_seq_length() == 28 and cache.seq_lens.tolist() == [28]
    longer = torch.cat([ids, prompt(1)], 1)
    assert generate(model, 2, longer, past_key_values=cache).equal(expected_tokens(model, 2, longer))


def test_padding_does_not_count_towards_max_len(model):
    batch = padded_prompt([10, 20])
    cache = zz.ZigzagCache(model.config, PLAN, max_len=24)
    assert generate(model, 5, **batch, past_key_values=cache).shape == (2, 5)
    with pytest.raises(RuntimeError, match="cache is full"):
        generate(model, 6, **batch, past_key_values=zz.ZigzagCache(model.config, PLAN, max_len=24))


def test_disable_restores_the_model_exactly():
    model, ids = new_model("llama"), prompt(40)
    with torch.no_grad():
        before = model(ids).logits
        zz.enable(model, PLAN)
        assert not model(ids).logits.equal(before)
        zz.disable(model)
        assert model(ids).logits.equal(before)
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_the_context_manager_disables_after_an_error():
    model = new_model("llama")
    with pytest.raises(KeyError), zz.zigzag(model, PLAN):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_two_models_at_once():
    plans = [PLAN, zz.Plan(MIXED[::-1], sink=0, window=8)]
    models, ids = [new_model("llama") for _ in plans], prompt(50)
    for one, plan in zip(models, plans, strict=True):
        zz.enable(one, plan)
    together = [generate(one, 10, ids) for one in models]
    zz.disable(models[0])
    assert generate(models[1], 10, ids).equal(together[1])
    assert not together[0].equal(together[1])
