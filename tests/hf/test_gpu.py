"""A whole model on the GPU in bfloat16 against the same model on the CPU in float32, and what a long context costs there."""

import copy
from dataclasses import replace

import pytest
import torch
from gpu import launched_kernels, needs_cuda
from tiny_models import NUM_LAYERS, new_model, padded_prompt, prompt, tiny_model

import zigzag_ext as zz
from zigzag_ext.hf.cache_argument import cache_argument

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)


FORMATS = {name: replace(PLAN, kv_format=name) for name in ("fp8", "int8", "int4", "int8/int4")}
FORMATS["rings"] = replace(PLAN, kv_format="int8", ring_kv_format="int8")
HEADS = zz.Plan(["streaming", ["retrieval", "streaming"], ["streaming", "retrieval"], "retrieval"], sink=4, window=16)


def logits_of(model, batch, steps, compile=False, plan=PLAN):
    """Logits of a prefill and of single-token steps that are fed the same tokens whatever the model answers."""
    cache = zz.ZigzagCache(model.config, plan, max_len=256)
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    logits = []
    with zz.zigzag(model, plan, compile=compile), torch.no_grad():
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        logits.append(model(**batch, position_ids=positions, past_key_values=cache).logits[:, -1])
        for token in steps.to(device):
            batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
            positions = positions[:, -1:] + 1
            step = {"attention_mask": batch["attention_mask"], "position_ids": positions}
            logits.append(model(token[:, None], **step, past_key_values=cache).logits[:, -1])
    return torch.stack(logits).float().cpu()


def flips(plan) -> float:
    """How much further apart results may be that are rounded otherwise on the way: a code flips to its neighbour, a step away."""
    if "int4" in plan.kv_format:
        return 4
    return 1 if plan.kv_format == plan.ring_kv_format == "none" else 2


@needs_cuda
@pytest.mark.parametrize("plan", [PLAN, HEADS, *FORMATS.values()], ids=["layers", "heads", *FORMATS])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("lengths", [[100], [90, 37, 5]], ids=["single", "left_padded"])
def test_gpu_in_bfloat16_agrees_with_cpu(family, lengths, plan):
    model = tiny_model(family)
    steps = prompt(60, len(lengths)).T
    expected = logits_of(model, padded_prompt(lengths), steps, plan=plan)
    actual = logits_of(copy.deepcopy(model).to("cuda", torch.bfloat16), padded_prompt(lengths), steps, plan=plan)
    yardstick = (expected - expected.bfloat16().float()).norm() / expected.norm()
    error = (actual - expected).norm() / expected.norm()
    assert error < max(0.06 * flips(plan), 20 * yardstick), f"relative error of the logits {error:.3f}"


@needs_cuda
def test_generate_on_the_gpu():
    """generate() runs, prefill in chunks or at once gives the same first token, and streaming layers stay small."""
    model = new_model("llama").to("cuda", torch.bfloat16)
    tokens = prompt(150).cuda()
    with zz.zigzag(model, PLAN):
        cache = zz.ZigzagCache(model.config, PLAN, max_len=256)
        once = model.generate(tokens, max_new_tokens=20, do_sample=False, **cache_argument(model, cache))
        chunked = model.generate(tokens, max_new_tokens=1, do_sample=False, prefill_chunk_size=37)
    assert once.shape == (1, 170) and torch.equal(chunked[:, :151], once[:, :151])
    assert cache.layers[0].keys.shape[2] == PLAN.sink + PLAN.window


def greedy(model, ids, new_tokens):
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False, attention_mask=torch.ones_like(ids), eos_token_id=None)


@needs_cuda
@pytest.mark.parametrize("plan", [PLAN, HEADS, *FORMATS.values()], ids=["layers", "heads", *FORMATS])
@pytest.mark.parametrize("lengths", [[100], [90, 37, 5]], ids=["single", "left_padded"])
def test_compiled_steps_agree_with_eager_ones(lengths, plan):
    model = new_model("llama").to("cuda", torch.bfloat16)
    batch, steps = padded_prompt(lengths), prompt(60, len(lengths)).T
    expected = logits_of(model, batch, steps, plan=plan)
    for _ in range(2):  # the second time from a cache of other addresses
        actual = logits_of(model, batch, steps, compile=True, plan=plan)
        assert (actual - expected).norm() / expected.norm() < 0.05 * flips(plan)


@needs_cuda
def test_one_captured_graph_serves_every_length_and_prompt(monkeypatch):
    """One capture, one attention kernel per layer, no copy of anything as large as a cache, outputs that stay valid."""
    model, captures, capture = new_model("llama").to("cuda", torch.bfloat16), [], torch.cuda.CUDAGraph
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda *args, **kwargs: captures.append(1) or capture(*args, **kwargs))
    with zz.zigzag(model, PLAN, max_len=32768, compile=True):
        first = greedy(model, prompt(50).cuda(), 20)
        with torch.compiler.set_stance("fail_on_recompile"):
            greedy(model, prompt(700, seed=2).cuda(), 300)
            assert greedy(model, prompt(50).cuda(), 20).equal(first)
            assert len(captures) == 1
        cache, token = zz.ZigzagCache(model.config, PLAN, max_len=32768), prompt(1).cuda()
        with torch.no_grad():
            for ids in (prompt(8000).cuda(), token):  # the first step of a cache is captured
                model(ids, past_key_values=cache)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            for _ in range(20):
                model(token, past_key_values=cache)
            grown = torch.cuda.max_memory_allocated() - before
    buffer = cache.layers[1].keys.nbytes
    assert buffer >= 8000 * 2 * 64 * 2 and grown < buffer / 10, f"steps took {grown} bytes, a buffer has {buffer}"


@needs_cuda
@pytest.mark.parametrize("plan, launches", [(PLAN, NUM_LAYERS), (HEADS, NUM_LAYERS + 2)], ids=["layers", "heads"])
def test_kernels_of_a_captured_step(plan, launches):
    """One attention kernel per layer, two per mixed layer."""
    model = new_model("llama").to("cuda", torch.bfloat16)
    cache, token = zz.ZigzagCache(model.config, plan, max_len=128), prompt(1).cuda()
    with zz.zigzag(model, plan, compile=True), torch.no_grad():
        model(prompt(30).cuda(), past_key_values=cache)
        kept = model(token, past_key_values=cache).logits
        before = kept.clone()
        names = launched_kernels(lambda: model(token, past_key_values=cache))
        assert kept.equal(before), "a later step overwrote the logits of an earlier one"
    assert sum("decode" in name for name in names) == launches, names
    assert not any("fmha" in name or "flash" in name for name in names), names


@needs_cuda
def test_weights_that_move_are_noticed():
    model = new_model("llama").to("cuda", torch.bfloat16)
    with zz.zigzag(model, PLAN, max_len=128, compile=True):
        first = greedy(model, prompt(30).cuda(), 20)
        model.to("cpu").to("cuda")
        spoiled = torch.randn(1 << 24, device="cuda")  # where the weights were
        assert greedy(model, prompt(30).cuda(), 20).equal(first)
        with torch.no_grad():
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.roll(1, 0))
        changed = greedy(model, prompt(30).cuda(), 20)
    assert spoiled.isfinite().all() and not changed.equal(first)
