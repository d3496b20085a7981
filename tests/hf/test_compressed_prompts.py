"""A model whose retrieval layers keep a part of the prompt: `enable(..., compress=...)`."""

import copy

import pytest
import torch
from tiny_models import generate, new_model, padded_prompt, prompt, tiny_model

import zigzag_ext as zz

SINK, WINDOW, LENGTH = 4, 16, 200
PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=SINK, window=WINDOW)
HEADS = zz.Plan([("retrieval", "streaming"), "streaming", "retrieval", "streaming"], sink=SINK, window=WINDOW)
FORMATS = zz.Plan(PLAN.kinds, sink=SINK, window=WINDOW, kv_format="int8", key_smoothing=True)
PLANS = {"plain": PLAN, "heads": HEADS, "formats": FORMATS}
METHOD = zz.PromptWindows(budget=60, window=4, observe=8, per_head=True)


def cache_of(model, plan=PLAN, method=METHOD, **options):
    return zz.ZigzagCache(model.config, plan, compress=method, **options)


def held_keys(cache) -> list[torch.Tensor]:
    return [store.read(0, 60)[0] for layer in cache.layers for store in layer.stores if store.lengths]


@pytest.fixture(scope="module", params=PLANS)
def model(request):
    with zz.zigzag(tiny_model(), PLANS[request.param]) as model, torch.no_grad():
        yield model


def plan_of(model):
    return model._zigzag_session.plan


def test_layers_hold_the_budget_and_say_so(model):
    cache = cache_of(model, plan_of(model))
    ids = prompt(LENGTH)
    generate(model, 5, ids, past_key_values=cache)
    layers = [i for i, kind in enumerate(plan_of(model).kinds) if kind != "streaming"]
    assert cache.compressed == dict.fromkeys(layers, (60 + 4, LENGTH - 60))
    assert "tokens kept" in cache.memory_report()
    full = zz.ZigzagCache(model.config, plan_of(model))
    generate(model, 5, ids, past_key_values=full)
    assert cache.kv_bytes() < full.kv_bytes() and cache.get_seq_length() == LENGTH + 4


def test_a_budget_of_the_whole_prompt_changes_no_bit(model):
    ids = prompt(LENGTH)
    caches = [cache_of(model, plan_of(model), zz.PromptWindows(budget=b, observe=8)) for b in (1.0, LENGTH)]
    caches.append(zz.ZigzagCache(model.config, plan_of(model)))
    logits = []
    for cache in caches:
        model(ids, past_key_values=cache)
        logits.append(model(prompt(1, seed=7), past_key_values=cache).logits)
        assert not cache.compressed
    assert logits[0].equal(logits[2]) and logits[1].equal(logits[2])


@pytest.mark.parametrize("chunk", [7, 64, 199])
def test_a_prompt_in_chunks_keeps_what_one_shot_keeps(model, chunk):
    if plan_of(model).key_smoothing:
        chunk = 128 + chunk // 4  # shorter first chunks smooth keys by another mean
    ids, kept = prompt(LENGTH), []
    one, pieces, own = (cache_of(model, plan_of(model)) for _ in range(3))
    generate(model, 2, ids, past_key_values=one)
    generate(model, 2, ids, past_key_values=pieces, prefill_chunk_size=chunk)
    session = model._zigzag_session
    before, session.prefill_chunk = session.prefill_chunk, chunk
    try:
        generate(model, 2, ids, past_key_values=own)
    finally:
        session.prefill_chunk = before
    for cache in (one, pieces, own):
        assert cache.compressed
        kept.append(held_keys(cache))
    for other in kept[1:]:
        for a, b in zip(kept[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5 if plan_of(model) is not FORMATS else 5e-2, rtol=1e-4)


def test_padded_rows_choose_for_themselves(model):
    lengths = [LENGTH, 40, 130]
    batch = padded_prompt(lengths)
    cache = cache_of(model, plan_of(model))
    tokens = generate(model, 6, **batch, past_key_values=cache)
    for row, length in enumerate(lengths):
        alone = cache_of(model, plan_of(model))
        assert generate(model, 6, batch["input_ids"][row : row + 1, -length:], past_key_values=alone).equal(tokens[row : row + 1])
        assert bool(alone.compressed) == (length > 60)


def test_the_rest_of_the_model_sees_the_same_positions():
    """Streaming layers hold what they did, and one cache serves prompt after prompt."""
    with zz.zigzag(new_model("llama"), PLAN) as model, torch.no_grad():
        cache, full = cache_of(model), zz.ZigzagCache(model.config, PLAN)
        for turn in range(2):
            ids = prompt(LENGTH - 30 * turn, seed=turn)
            for each in (cache, full):
                each.reset()
                model(ids, past_key_values=each)
            cache.compress()
            for layer in (0,):
                assert cache.layers[layer].keys.equal(full.layers[layer].keys)
            assert cache.seq_lens.equal(full.seq_lens)
            assert 57 <= cache.compressed[1][0] <= 60 and sum(cache.compressed[1]) == LENGTH - 30 * turn


def test_turns_crops_rows_and_copies(model):
    ids = prompt(LENGTH, 2)
    cache = cache_of(model, plan_of(model), rollback=8)
    with pytest.raises(RuntimeError, match="made without compress="):
        zz.ZigzagCache(model.config, plan_of(model)).compress()
    model(ids, past_key_values=cache)
    model(prompt(3, 2, seed=2), past_key_values=cache)  # the first short forward ends the prompt
    before = dict(cache.compressed)
    assert before
    twin = copy.deepcopy(cache)
    model(prompt(4, 2, seed=3), past_key_values=cache)
    cache.crop(-4)
    found, expected = (model(prompt(1, 2, seed=4), past_key_values=each).logits for each in (cache, twin))
    torch.testing.assert_close(found, expected, atol=2e-5 if plan_of(model) is not FORMATS else 5e-2, rtol=1e-4)
    cache.crop(-1)
    with pytest.raises(RuntimeError, match=r"compressed prompt.*nothing was changed"):
        cache.crop(-5)
    assert cache.compressed == before
    model(prompt(90, 2, seed=5), past_key_values=cache)  # another turn: kept in full
    model(prompt(1, 2, seed=6), past_key_values=cache)
    assert {layer: dropped for layer, (_, dropped) in cache.compressed.items()} == {
        layer: dropped for layer, (_, dropped) in before.items()
    }
    cache.reorder_cache(torch.tensor([1, 0]))
    swapped = model(prompt(1, 2, seed=8).flip(0), past_key_values=copy.deepcopy(cache)).logits
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(model(prompt(1, 2, seed=8), past_key_values=cache).logits.flip(0), swapped, atol=2e-5, rtol=1e-4)
    cache.reset()
    assert not cache.compressed


def test_beams_choose_like_single_rows(model):
    ids = prompt(LENGTH)
    beams = generate(model, 6, ids, past_key_values=cache_of(model, plan_of(model)), num_beams=3)
    assert beams.shape == (1, 6)
    cache = cache_of(model, plan_of(model))
    generate(model, 6, ids.repeat(3, 1), past_key_values=cache)
    keys = held_keys(cache)
    assert all(part[0].equal(part[1]) for part in keys)


def test_asking_for_the_prompt_again_says_what_to_do():
    with zz.zigzag(new_model("llama"), PLAN) as model:
        cache = cache_of(model, rollback=300)
        generate(model, 3, prompt(LENGTH), past_key_values=cache)
        other = torch.cat([prompt(LENGTH)[:, :150], prompt(50, seed=9)], 1)
        with pytest.raises(RuntimeError, match=r"compressed prompt.*reset\(\)"):
            generate(model, 3, other, past_key_values=cache)
        assert cache.compressed


def test_compiled_steps_are_eager_steps():
    ids = prompt(LENGTH)
    eager, compiled = (zz.enable(new_model("llama"), PLAN, compress=METHOD, max_len=512, compile=c) for c in (False, True))
    assert generate(eager, 8, ids).equal(generate(compiled, 8, ids))
    assert generate(eager, 8, prompt(150, seed=3)).equal(generate(compiled, 8, prompt(150, seed=3)))


def test_enable_refuses_what_is_no_method():
    with pytest.raises(TypeError, match="compress must be None or a method such as"):
        zz.enable(new_model("llama"), PLAN, compress=0.12)
    with pytest.raises(ValueError, match="at least sink"):
        zz.enable(new_model("llama"), PLAN, compress=zz.PromptWindows(budget=20, observe=16))
    mixed_groups = zz.PromptWindows(budget=60, observe=8, group=2, per_head=True)
    with pytest.raises(ValueError, match="group=1"):
        zz.ZigzagCache(tiny_model().config, HEADS, compress=mixed_groups)


def test_a_prompt_that_fails_is_not_observed():
    with zz.zigzag(new_model("llama"), PLAN) as model, torch.no_grad():
        cache, fresh = cache_of(model), cache_of(model)
        handle = model.model.layers[2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(OSError, match="gone"):
            model(prompt(LENGTH, seed=5), past_key_values=cache)
        handle.remove()
        assert not cache.state.observed
        tokens = [generate(model, 4, prompt(LENGTH), past_key_values=each) for each in (cache, fresh)]
        assert tokens[0].equal(tokens[1]) and all(a.equal(b) for a, b in zip(held_keys(cache), held_keys(fresh), strict=True))
