"""What a plan means, computed without zigzag_ext: stock DynamicCache, stock eager attention, dense [N x N] masks.

`with dense_oracle(model, kinds, sink, window): model.generate(...)` keeps every token and masks the ones that a streaming
layer or head must not see. Positions count real tokens only, so the sink of a left-padded row is its first real tokens.
"""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from zigzag_ext.hf import compiled

_active = {}


def _attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, softcap=None, s_aux=None, **kwargs):
    kind, sink, window = _active["kinds"][module.layer_idx], _active["sink"], _active["window"]
    seen = attention_mask == 0  # [batch, 1, q_len, kv_len]: causal and not padding
    kinds = [kind] * key.shape[1] if isinstance(kind, str) else kind  # of the KV heads
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    streams = torch.tensor([each == "streaming" for each in kinds], device=key.device).repeat_interleave(group)
    if "streaming" in kinds:
        position = seen[:, 0, -1].cumsum(-1) - 1  # the last query sees every real token of its row
        position_q, position_k = position[:, -query.shape[2] :, None], position[:, None, :]
        near = (position_k < sink) | (position_q - position_k < window)
        seen = seen & (near[:, None] | ~streams[:, None, None])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query @ key.transpose(2, 3) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, torch.finfo(query.dtype).min)
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    weights = logits.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("dense_oracle", _attention)
AttentionMaskInterface.register("dense_oracle", eager_mask)


@contextmanager
def dense_oracle(model, kinds, sink: int, window: int):
    before = model.config._attn_implementation
    _active.update(kinds=kinds, sink=sink, window=window)
    model.set_attn_implementation("dense_oracle")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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


def next_logits(model, answer, input_ids, attention_mask) -> torch.Tensor:
    """Logits [batch, new tokens, vocab] from which `answer` [batch, new tokens] was to be chosen, in one forward."""
    mask = torch.cat([attention_mask, torch.ones_like(answer)], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    tokens = torch.cat([input_ids, answer], 1)
    with torch.no_grad():
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits  # with a cache, see `SharedKeys`
    return logits[:, input_ids.shape[1] - 1 : -1].float()


def traced_only(self, module, inputs):
    """What a compiled step does before the compiler of kernels: tracing the model, and RoPE that goes into the op."""
    compiled.fuse_rope(module.graph)
    module.recompile()
    return module.forward
