"""generate() with quantised caches: the tokens of the specification, whatever the chunking, batch and cache operations."""

from dataclasses import replace

import pytest
import torch
from tiny_models import generate, new_model, padded_prompt, prompt, tiny_model

import zigzag_ext as zz
from zigzag_ext.attention import ops, reference

PLAN = zz.Plan(["streaming", "retrieval", "retrieval", "streaming"], sink=4, window=16)
FORMATS = ["fp8", "int8", "int4", "int8/int4", "none/int8"]


@pytest.mark.parametrize("ring", ["none", "int8"])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_tokens_are_those_of_the_specification(monkeypatch, kv_format, ring):
    batch = padded_prompt([40, 12])
    plan = replace(PLAN, kv_format=kv_format, ring_kv_format=ring)
    with zz.zigzag(tiny_model(), plan, max_len=64) as model:  # the specification looks at every slot
        tokens = generate(model, 12, **batch)
        beams = generate(model, 8, **batch, num_beams=2)
        monkeypatch.setattr(ops, "attention", reference.attention)
        assert tokens.equal(generate(model, 12, **batch))
        assert beams.equal(generate(model, 8, **batch, num_beams=2))


@pytest.mark.parametrize("kv_format", ["fp8", "int4"])
def test_chunks_of_a_prompt(kv_format):
    """What a chunk border could change is gone: new tokens are attended as their codes. Also a cache that grows."""
    ids, plan = prompt(300, 1), replace(PLAN, kv_format=kv_format, ring_kv_format=kv_format)
    with zz.zigzag(tiny_model(), plan) as model:
        once = generate(model, 10, ids)
        assert once.equal(generate(model, 10, ids, prefill_chunk_size=37))
        assert once.equal(generate(model, 10, ids, past_key_values=zz.ZigzagCache(model.config, plan, 400)))


@pytest.mark.parametrize("compile", [False, True])
def test_formats_given_to_enable_take_the_place_of_the_plans(compile):
    """In plans of layers and of heads, piece by piece; the plan itself stays what it was."""
    mixed = zz.Plan([["retrieval", "streaming"], "retrieval", "streaming", "streaming"], sink=4, window=16)
    formats = {"kv_format": "int8/int4", "ring_kv_format": "int8", "key_smoothing": True}
    model, ids = new_model("llama"), prompt(40)
    for plan in (PLAN, mixed):
        answers = []
        for own, given in ((formats, {}), ({}, formats), ({"kv_format": "fp8", "key_smoothing": True}, formats)):
            before = replace(plan, **own)
            with zz.zigzag(model, before, max_len=64, compile=compile, **given), torch.inference_mode():
                cache = model(ids)[1]
                assert {(bool(s.window), str(s.kv_format)) for s in cache.stores} == {(False, "int8/int4"), (True, "int8")}
                answers.append(generate(model, 6, ids))
            assert before == replace(plan, **own)
        assert answers[0].equal(answers[1]) and answers[0].equal(answers[2])
    plain = {"kv_format": "none", "ring_kv_format": "none", "key_smoothing": False}
    with zz.zigzag(model, replace(PLAN, **formats), compile=compile, **plain), torch.inference_mode():
        assert {str(store.kv_format) for store in model(ids)[1].stores} == {"none"}


@pytest.mark.parametrize(
    "given",
    [{"kv_format": "int3"}, {"ring_kv_format": 8}, {"key_smoothing": True}, {"key_smoothing": 1}, {"kv_format": {"k": "int8"}}],
)
def test_formats_given_to_enable_are_refused_as_by_the_plan(given):
    model = tiny_model()
    with pytest.raises((TypeError, ValueError)) as of_plan:
        replace(PLAN, **given)
    with pytest.raises(type(of_plan.value)) as of_enable:
        zz.enable(model, PLAN, **given)
    assert str(of_enable.value) == str(of_plan.value) and model.config._attn_implementation == "sdpa"


def allocated(function, device) -> int:
    """Bytes of the largest tensor that `function()` allocates, on a GPU of all that it holds at a time."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("kv_format", ["fp8", "int8", "int4", "int8/int4"])
def test_generate_eager_and_compiled_copies_no_cache(device, kv_format):
    """Nor anything near the size of one layer's keys, whose codes are the smallest tensor in proportion to the context."""
    plan, tokens = replace(PLAN, kv_format=kv_format, ring_kv_format="int8"), {"cpu": 600, "cuda": 16000}[device]
    model, answers = new_model("llama").to(device, {"cpu": torch.float32, "cuda": torch.bfloat16}[device]), []
    for compile in (False, True):
        with zz.zigzag(model, plan, max_len=32768, compile=compile), torch.inference_mode():
            cache, ids = zz.ZigzagCache(model.config, plan, max_len=32768), prompt(tokens).to(device)
            for length in (tokens, 1):  # the first step of a cache is captured
                model(ids[:, :length], past_key_values=cache, logits_to_keep=1)
            steps = lambda: [model(ids[:, :1], past_key_values=cache, logits_to_keep=1) for _ in range(5)]  # noqa: B023, E731
            taken = allocated(steps, device)
            ids = torch.cat([ids, ids[:, :1].repeat(1, 6), ids[:, :2]], 1)  # generate() takes all, and attends two
            answers.append(generate(model, 20, ids, past_key_values=cache))
            keys = cache.layers[1].keys
        assert keys.shape[2] >= tokens and 0 < taken < keys.nbytes / 4, f"{taken} bytes, keys of a layer have {keys.nbytes}"
    assert device == "cuda" or answers[0].equal(answers[1])  # in bfloat16 the two round differently: see test_gpu.py


def test_bytes_and_report():
    sizes = {}
    for kv_format in ("none", "fp8", "int8", "int4", "int8/int4"):
        with zz.zigzag(tiny_model(), replace(PLAN, kv_format=kv_format)) as model:
            cache = zz.ZigzagCache(model.config, replace(PLAN, kv_format=kv_format), max_len=200)
            generate(model, 2, prompt(20, 1), past_key_values=cache)
        ring = 2 * 2 * (4 + 16) * 2 * 64 * 4  # 2 layers, K and V, slots, heads, head_dim, float32
        sizes[kv_format] = cache.memory_bytes() - ring
        pages = 2 * 4 * 4096  # 2 layers of at most 4 buffers, which grow by pages
        vector = {"none": 512, "fp8": 136, "int8": 136, "int4": 72, "int8/int4": 104}[kv_format]  # K and V of a head
        assert 0 <= sizes[kv_format] - 2 * 200 * 2 * vector <= pages
        report = cache.memory_report()
        assert f"{sizes[kv_format]:,} bytes" in report and f"{cache.memory_bytes():,} bytes" in report
        assert kv_format in report


def test_error_of_each_format_in_the_logits():
    """Against an unquantised cache: finer formats are nearer, and none is far. Bounds are for these weights."""
    ids, errors = prompt(200, 1), {}
    for kv_format in ("none", "int8", "fp8", "int4"):
        with torch.inference_mode(), zz.zigzag(tiny_model(), replace(PLAN, kv_format=kv_format)) as model:
            errors[kv_format] = model(ids).logits.double()
    exact = errors.pop("none")
    error = {name: float((logits - exact).norm() / exact.norm()) for name, logits in errors.items()}
    assert 0 < error["int8"] < error["fp8"] < error["int4"] < 0.5 and error["int8"] < 0.02, error
