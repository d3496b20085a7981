"""What tests of families compare: an enabled model with the model's own eager attention, in float32."""

from contextlib import contextmanager

import torch

import zigzag_ext as zz
from zigzag_ext.hf import compiled
from zigzag_ext.planning.native import whole_plan


@contextmanager
def stock(model):
    """The model's own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(before)


def close(got, expected) -> bool:
    return torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def logits_of(model, tokens: int, **batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and the logits they were chosen from."""
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    output = model.generate(**batch, max_new_tokens=tokens, **options)
    return output.sequences[:, batch["input_ids"].shape[1] :], torch.stack(output.logits, 1)


def streaming_plan(model) -> zz.Plan:
    """Every other full layer streams, the first one too, with a sink of 2 and a window of 5."""
    windows = zz.native_windows(model.config)
    kinds = ["retrieval" if place % 2 else "streaming" for place in range(windows.count(None))]
    return zz.Plan(kinds, sink=2, window=5).with_native(windows) if kinds else whole_plan(windows)


def traced_only(self, module, inputs):
    """What a compiled step does before the compiler of kernels: tracing the model, and RoPE that goes into the op."""
    compiled.fuse_rope(module.graph)
    module.recompile()
    return module.forward
