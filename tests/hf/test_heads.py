"""Plans per KV head in generate(): one layer of each kind and two mixed ones, against dense masks per head."""

import copy
from dataclasses import replace

import pytest
import torch
from dense_oracle import dense_oracle
from published import LLAMA3, needs_published
from tiny_models import NUM_LAYERS, generate, new_model, padded_prompt, prompt, tiny_model

import zigzag_ext as zz
from zigzag_ext.planning import exchange

SINK, WINDOW, KV_HEADS = 4, 16, 2
KINDS = ["streaming", ("retrieval", "streaming"), ("streaming", "retrieval"), "retrieval"]
PLAN = zz.Plan(KINDS, sink=SINK, window=WINDOW)
EIGHT = {"num_attention_heads": 8, "num_key_value_heads": 8}  # of which any may retrieve


@pytest.fixture
def model():
    model = tiny_model()
    with zz.zigzag(model, PLAN):
        yield model


def expected_tokens(new_tokens, plan=PLAN, config=None, **options):
    """The same call on a second model under dense masks."""
    twin = new_model("llama", **config or {})
    with dense_oracle(twin, plan.kinds, plan.sink, plan.window):
        return generate(twin, new_tokens, **options)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gpt_neox", "phi3"])
@pytest.mark.parametrize("lengths", [[40], [40, 23, 3]], ids=["single", "left_padded"])
def test_tokens_over_many_windows_are_those_of_dense_masks(family, lengths):
    heads = 4 if family == "gpt_neox" else 2
    model, batch = new_model(family, num_key_value_heads=heads), padded_prompt(lengths)
    kinds = [kind if isinstance(kind, str) else kind * (heads // 2) for kind in KINDS]
    with dense_oracle(model, kinds, SINK, WINDOW):
        expected = generate(model, 120, **batch)
    with zz.zigzag(model, zz.Plan(kinds, sink=SINK, window=WINDOW)):
        assert generate(model, 120, **batch).equal(expected)
    with zz.zigzag(model, zz.Plan(["retrieval"] * NUM_LAYERS, sink=SINK, window=WINDOW)):
        assert not generate(model, 120, **batch).equal(expected)


@pytest.mark.parametrize("seed", range(4))
def test_any_pattern_of_heads(seed):
    retrieval = torch.rand(NUM_LAYERS, 8, generator=torch.Generator().manual_seed(seed)) < 0.5
    plan, batch = zz.Plan.from_heads(retrieval, sink=seed, window=5 + 7 * seed), padded_prompt([30, 11])
    assert plan.mixed_layers
    with zz.zigzag(new_model("llama", **EIGHT), plan) as model:
        assert generate(model, 60, **batch).equal(expected_tokens(60, plan, EIGHT, **batch))


@needs_published
def test_a_published_pattern():
    """DuoAttention's for Llama-3-8B: 32 layers, 31 of them with heads of both kinds, here over a smaller window."""
    plan = replace(exchange.from_duo(LLAMA3, sparsity=0.5), sink=SINK, window=WINDOW)
    assert len(plan.mixed_layers) == 31
    config = {"num_hidden_layers": 32, "num_attention_heads": 16, "num_key_value_heads": 8}
    batch = padded_prompt([40, 23])
    with zz.zigzag(new_model("llama", **config), plan) as model:
        with torch.profiler.profile() as profile:
            tokens = generate(model, 50, **batch)
        calls = [event.name for event in profile.events() if event.name.startswith("zigzag::attention")]
    assert calls.count("zigzag::attention_") == 50 * (31 * 2 + 1)
    assert tokens.equal(expected_tokens(50, plan, config, **batch))


@pytest.mark.parametrize("chunk", [1, 7, 16, 30])
def test_chunks_of_a_prompt(chunk):
    batch = padded_prompt([50, 31])
    with zz.zigzag(new_model("llama"), PLAN, prefill_chunk=chunk) as model:
        assert generate(model, 30, **batch).equal(expected_tokens(30, **batch))


def test_beams_and_copies_and_turns(model):
    batch = padded_prompt([30, 11])
    assert generate(model, 40, **batch, num_beams=3).equal(expected_tokens(40, **batch, num_beams=3))
    cache, ids = zz.ZigzagCache(model.config, PLAN), prompt(45)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for seed in (3, 4):
        longer = torch.cat([ids, prompt(9, seed=seed)], 1)
        assert generate(model, 12, longer, past_key_values=copy.deepcopy(cache)).equal(expected_tokens(12, input_ids=longer))
    answer = generate(model, 12, longer, past_key_values=cache)
    again = torch.cat([longer, answer, prompt(3)], 1)
    assert generate(model, 20, again, past_key_values=cache).equal(expected_tokens(20, input_ids=again))


def test_without_a_cache(model):
    batch = padded_prompt([40, 12])
    assert generate(model, 6, **batch, use_cache=False).equal(expected_tokens(6, **batch))


def test_reset_growth_and_memory(model):
    """Each kind of heads takes what its kind takes; reset() gives the memory of retrieval heads back; addresses stay."""
    cache = zz.ZigzagCache(model.config, PLAN)
    first = generate(model, 5, prompt(20), past_key_values=cache)
    layer = cache.layers[1]
    assert repr(layer) == "mixed(retrieval (0,), streaming(sink=4, window=16) (1,))"
    full, ring = layer.stores
    assert full.keys.shape[1] == 1 and ring.keys.shape == (1, 1, SINK + WINDOW, 64)
    address = full.buffers["keys"].data_ptr()
    before = cache.memory_bytes()
    longer = torch.cat([prompt(20), first], 1)
    answer = generate(model, 600, longer, past_key_values=cache)
    assert answer.equal(expected_tokens(600, input_ids=longer)) and full.buffers["keys"].data_ptr() == address
    assert cache.memory_bytes() - before >= 2 * (1 + 1 + KV_HEADS) * 300 * 64 * 4  # K and V of the retrieval heads
    rings = sum(store.memory_bytes for store in cache.stores if store.window)
    assert rings == 2 * (SINK + WINDOW) * 64 * 4 * (KV_HEADS + 1 + 1)
    cache.reset()
    assert cache.memory_bytes() == rings
    assert generate(model, 5, prompt(20), past_key_values=cache).equal(first)


def test_a_full_cache_raises(model):
    cache = zz.ZigzagCache(model.config, PLAN, max_len=30)
    assert cache.get_max_length(1) == 30
    with torch.no_grad():
        model(prompt(28), past_key_values=cache)
        with pytest.raises(RuntimeError, match="max_len is 30 tokens"):
            model(prompt(3), past_key_values=cache)


def test_a_plan_for_another_number_of_heads_is_refused():
    plan = zz.Plan([("retrieval", "streaming", "streaming")] * NUM_LAYERS, sink=1, window=1)
    with pytest.raises(ValueError, match="layers of 3 KV heads, these have 2"):
        zz.enable(new_model("llama"), plan)


def test_keys_of_other_heads_than_planned_are_refused():
    """As tensor parallelism would bring them."""
    cache = zz.ZigzagCache(new_model("llama").config, PLAN)
    q = torch.zeros(1, 1, 1, 64)
    with pytest.raises(ValueError, match="layer 1: the plan is for 2 KV heads, the keys have 1"), cache.forward(1, 1):
        cache.layers[1].attend(q, q, q, None)


def test_chunk_semantics_of_duo_attention(model):
    """The first chunk is full attention in every head."""
    with zz.prefill_options(duo_attention=True), torch.no_grad():
        logits = model(prompt(50)).logits
    twin = new_model("llama")
    with torch.no_grad():
        torch.testing.assert_close(logits, twin(prompt(50)).logits, atol=2e-4, rtol=1e-4)
        assert (model(prompt(50)).logits - logits).abs().max() > 1e-2


def test_quantised_heads(model):
    """Heads that retrieve take `kv_format`, heads that stream `ring_kv_format`; 8 bits are near the plain result."""
    plan = zz.Plan(KINDS, sink=SINK, window=WINDOW, kv_format="int8", ring_kv_format="fp8")
    with torch.no_grad():
        plain = model(prompt(60)).logits
        cache = zz.ZigzagCache(model.config, plan, max_len=256)
        logits = [model(chunk, past_key_values=cache).logits for chunk in prompt(60).split([40, *[1] * 20], 1)]
    assert 0 < (torch.cat(logits, 1) - plain).norm() / plain.norm() < 0.2
    full, ring = cache.layers[1].stores
    assert full.keys.dtype == torch.int8 and ring.keys.dtype == torch.float8_e4m3fn
    kinds = [line.split()[:2] for line in cache.memory_report().splitlines()]
    assert ["retrieval", "heads"] in kinds and ["streaming", "heads"] in kinds


def test_compiled_steps_are_two_calls_per_mixed_layer_without_copies(model):
    cache, ids = zz.ZigzagCache(model.config, PLAN, max_len=4096), prompt(9)
    with zz.zigzag(new_model("llama"), PLAN, max_len=640, compile=True) as compiled:
        for batch in ({"input_ids": prompt(20)}, padded_prompt([20, 9, 3])):
            assert generate(compiled, 200, **batch).equal(generate(model, 200, **batch))
        ids = torch.cat([ids, generate(compiled, 4, ids, past_key_values=cache)], 1)
        with torch.compiler.set_stance("fail_on_recompile"), torch.profiler.profile(profile_memory=True) as profile:
            answer = generate(compiled, 3, ids, past_key_values=cache)
    assert answer.equal(generate(model, 3, ids))
    calls = [event.name for event in profile.events() if event.name.startswith("zigzag::attention")]
    assert calls.count("zigzag::attention_") == 3 * (2 + 2 * 2)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest < 4096 * 2 * 64 * 4 / 10, "something as large as a cache was allocated"
