"""What one decode step does to the cache: one launch per layer, nothing else touches the buffers, nobody waits for the device."""

import pytest
import torch
from gpu import launched_kernels, needs_cuda
from tiny_models import NUM_LAYERS, new_model, padded_prompt, prompt, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import zigzag_ext as zz

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)


class Recorder(TorchDispatchMode):
    """Names of all ops, and of those that were given a key or value buffer of `cache`."""

    def __init__(self, cache):
        super().__init__()
        self.ops, self.on_cache = [], []
        self.buffers = {b.untyped_storage().data_ptr() for store in cache.stores for b in store.buffers.values()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(func.name())
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(t.untyped_storage().data_ptr() in self.buffers for t in tensors):
            self.on_cache.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [[30], [30, 11]], ids=["single", "left_padded"])
def test_one_launch_per_layer_and_no_wait(lengths):
    model, cache = tiny_model(), zz.ZigzagCache(tiny_model().config, PLAN, max_len=64)
    batch = padded_prompt(lengths)
    positions = torch.tensor(lengths)[:, None]
    with zz.zigzag(model, PLAN), torch.no_grad():
        model(**batch, past_key_values=cache)
        mask = torch.cat([batch["attention_mask"], torch.ones(len(lengths), 1, dtype=torch.long)], 1)
        with Recorder(cache) as step:
            model(prompt(1, len(lengths)), attention_mask=mask, position_ids=positions, past_key_values=cache)
    assert step.on_cache == ["zigzag::attention_"] * NUM_LAYERS
    assert step.ops.count("zigzag::attention_") == NUM_LAYERS
    reads = step.ops.count("aten::_local_scalar_dense")
    assert reads == 1, "of the mask, which is checked at once on a CPU and later on a GPU"


@needs_cuda
def test_one_gpu_launch_per_layer():
    """The attention part of a step is one decode kernel per layer; nothing is concatenated, indexed or gathered around it."""
    model = new_model("llama").to("cuda", torch.bfloat16)
    cache = zz.ZigzagCache(model.config, PLAN, max_len=64)
    q = torch.randn(1, 4, 1, 64, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, 1, 2, 1, 64, dtype=torch.bfloat16, device="cuda")

    def attention_part():
        with cache.forward(1, 1):
            for layer in cache.layers:
                layer.attend(q, k, v, None)

    with zz.zigzag(model, PLAN), torch.no_grad():
        model(prompt(30).cuda(), past_key_values=cache)
        part = launched_kernels(attention_part)
        step = launched_kernels(lambda: model(prompt(1).cuda(), past_key_values=cache))
    decode = [name for name in part if "decode" in name]
    assert len(decode) == NUM_LAYERS and len(part) == NUM_LAYERS + 2, part  # the lengths and the note of what was appended
    assert sum("decode" in name for name in step) == NUM_LAYERS, step
    assert not any("fmha" in name or "flash" in name for name in step), step


@needs_cuda
@pytest.mark.parametrize("q_len", [1, 2, 16])
@pytest.mark.parametrize("compile", [False, True])
def test_a_short_forward_never_waits_for_the_gpu(q_len, compile):
    """Its mask included. What a mask got wrong is said by a later forward."""
    with zz.zigzag(new_model("llama").to("cuda", torch.bfloat16), PLAN, max_len=256, compile=compile) as model, torch.no_grad():
        cache = zz.ZigzagCache(model.config, PLAN, max_len=256, rollback=20)
        ids, mask = prompt(200).cuda(), torch.ones(1, 200, dtype=torch.long, device="cuda")
        model(ids[:, :30], attention_mask=mask[:, :30], past_key_values=cache)
        positions = torch.arange(200, device="cuda")[None]

        def forward(start):
            seen = {"attention_mask": mask[:, : start + q_len], "position_ids": positions[:, start : start + q_len]}
            return model(ids[:, start : start + q_len], past_key_values=cache, logits_to_keep=1, **seen)

        forward(30), forward(30 + q_len)  # compiled, captured
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward(30 + 2 * q_len)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        mask[0, 5:9] = 0
        forward(30 + 3 * q_len)
        with pytest.raises(ValueError, match="in an earlier step, whose output is wrong: attention_mask masks other tokens"):
            for step in range(4, 7):  # the copy to the host that is under way may have started before
                torch.cuda.synchronize()
                forward(30 + step * q_len)
