"""A whole model on the GPU in bfloat16 against the same model on the CPU in float32, and what a long context costs there."""

import copy

import pytest
import torch
from gpu import needs_cuda
from tiny_models import padded_prompt, prompt, tiny_model

import zigzag_ext as zz

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)


def logits_of(model, batch, steps):
    """Logits of a prefill and of single-token steps that are fed the same tokens whatever the model answers."""
    cache = zz.ZigzagCache(model.config, PLAN, max_len=256)
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    logits = []
    with zz.zigzag(model, PLAN), torch.no_grad():
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        logits.append(model(**batch, position_ids=positions, past_key_values=cache).logits[:, -1])
        for token in steps.to(device):
            batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
            positions = positions[:, -1:] + 1
            step = {"attention_mask": batch["attention_mask"], "position_ids": positions}
            logits.append(model(token[:, None], **step, past_key_values=cache).logits[:, -1])
    return torch.stack(logits).float().cpu()


@needs_cuda
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("lengths", [[100], [90, 37, 5]], ids=["single", "left_padded"])
def test_gpu_in_bfloat16_agrees_with_cpu(family, lengths):
    model = tiny_model(family)
    steps = prompt(60, len(lengths)).T
    expected = logits_of(model, padded_prompt(lengths), steps)
    actual = logits_of(copy.deepcopy(model).to("cuda", torch.bfloat16), padded_prompt(lengths), steps)
    yardstick = (expected - expected.bfloat16().float()).norm() / expected.norm()
    error = (actual - expected).norm() / expected.norm()
    assert error < max(0.06, 20 * yardstick), f"relative error of the logits {error:.3f}"


@needs_cuda
def test_generate_on_the_gpu():
    """generate() runs, prefill in chunks or at once gives the same first token, and streaming layers stay small."""
    model = tiny_model().to("cuda", torch.bfloat16)
    tokens = prompt(150).cuda()
    with zz.zigzag(model, PLAN):
        cache = zz.ZigzagCache(model.config, PLAN, max_len=256)
        once = model.generate(tokens, max_new_tokens=20, do_sample=False, past_key_values=cache)
        chunked = model.generate(tokens, max_new_tokens=1, do_sample=False, prefill_chunk_size=37)
    assert once.shape == (1, 170) and torch.equal(chunked[:, :151], once[:, :151])
    assert cache.layers[0].keys.shape[2] == PLAN.sink + PLAN.window
