"""Prompts of a whole model on the GPU: every backend gives the logits of our kernel, and memory does not follow the prompt."""

import pytest
import torch
from gpu import needs_cuda
from tiny_models import generate, new_model, prompt

import zigzag_ext as zz
from zigzag_ext.attention import backends as prefill_backends

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)


@pytest.fixture
def model():
    return new_model("llama", max_position_embeddings=20_000).to("cuda", torch.bfloat16)


def last_logits(model, ids, chunks, backend):
    cache = zz.ZigzagCache(model.config, PLAN, max_len=ids.shape[1])
    with zz.zigzag(model, PLAN), zz.prefill_options(backend), torch.no_grad():
        for piece in ids.split(chunks, dim=1):
            logits = model(piece, past_key_values=cache, logits_to_keep=1).logits
    return logits[:, -1].float()


@needs_cuda
@pytest.mark.parametrize("name", ["cudnn", "flash", "fa3", "auto"])
@pytest.mark.parametrize("chunks", [[3000], [1100, 900, 17, 1, 982], [40] * 75], ids=["once", "mixed", "short"])
def test_backends_agree_with_our_kernel(model, name, chunks):
    if name == "fa3":
        pytest.importorskip("fa3_fwd_interface")
    if name != "auto" and not prefill_backends.serves(name, model.device, torch.bfloat16, 64):
        pytest.skip(f"{name} does not serve this GPU")
    ids = prompt(3000, 2).cuda()
    expected, actual = last_logits(model, ids, 3000, "zigzag"), last_logits(model, ids, chunks, name)
    assert float((actual - expected).norm() / expected.norm()) < 0.06


@needs_cuda
def test_peak_memory_beside_the_cache_does_not_follow_the_prompt(model):
    peaks = []
    for tokens in (4000, 4000, 16_000):  # the first run warms up
        cache = zz.ZigzagCache(model.config, PLAN, max_len=tokens + 1)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with zz.zigzag(model, PLAN, prefill_chunk=1024):
            generate(model, 1, prompt(tokens).cuda(), past_key_values=cache)
        peaks.append(torch.cuda.max_memory_allocated() - before - cache.memory_bytes())
        del cache
    assert peaks[2] - peaks[1] < 3 << 20, f"{peaks}: more than ids, mask and positions of 12,000 tokens"
