"""The attention and mask functions registered with transformers under the name "zigzag".

What attends is `zigzag_ext.cache.forward.current()`, one per thread: a keyword argument would not do, since some families
(Nemotron, StableLM) do not hand theirs down to the attention.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import causal_mask_function

from ..cache.forward import current
from .cache_argument import tested_range

NAME = "zigzag"

# Arguments that reach an attention function and change nothing about what it has to compute, as a cache does not. Any other one
# that is not None or False raises: it may stand for softcap, learned sinks, packed sequences, position biases, sparse indices ...
_HARMLESS = {
    "cache_position",
    "ignore_index",
    "layer_idx",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "shift_labels",
    "token_type_ids",
    "use_cache",
}


class UnsupportedMask:
    """Stands in for a mask that is not plainly causal. Some models make such masks and use none, so only its use raises."""

    def __init__(self, mask_function):
        self.name = getattr(mask_function, "__qualname__", repr(mask_function))


def mask(*args, mask_function=causal_mask_function, **kwargs) -> UnsupportedMask | None:
    """Builds nothing: causality and windows are in the kernels, padding is read from the 2-D mask by `Forward`."""
    return None if mask_function is causal_mask_function else UnsupportedMask(mask_function)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """One launch: attention over the layer's cache and the new tokens, and the append of the new tokens.

    query [batch, num_q_heads, q_len, head_dim]; key, value [batch, num_kv_heads, q_len, head_dim], the new tokens only.
    Returns [batch, q_len, num_q_heads, head_dim] and no weights.
    """
    name = type(module).__name__
    entry = current()
    if entry is None:
        raise RuntimeError(
            f"{name} runs zigzag attention without a zigzag cache: call the model that was given to zigzag_ext.enable(model, "
            "plan), not a part of it, and do not set attn_implementation='zigzag' by hand; a model made from the config of an "
            "enabled one needs a copy.deepcopy of that config"
        )
    if attention_mask is not None:
        given = attention_mask.name if isinstance(attention_mask, UnsupportedMask) else f"a {type(attention_mask).__name__}"
        raise ValueError(
            f"{name} needs the attention mask {given}; zigzag attention serves causal masks with padding; several "
            "documents need a row each, padded"
        )
    if dropout:
        raise ValueError(f"{name} asks for attention dropout {dropout}; zigzag attention is for inference: call model.eval()")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{name} is not causal; zigzag attention serves decoder self-attention only")
    unknown = sorted(k for k, v in kwargs.items() if k not in _HARMLESS and not (v is None or v is False or isinstance(v, Cache)))
    if unknown:
        raise ValueError(f"{name} needs {', '.join(unknown)}, which zigzag attention does not compute")
    if not entry.was_given(module.layer_idx):
        raise RuntimeError(
            f"{name}, layer {module.layer_idx}, attends without having been given the ZigzagCache of this forward: "
            f"the model does not hand it down to its layers ({tested_range()})"
        )
    query, key, value = _autocast(query, key, value)
    return entry.attend(module.layer_idx, query, key, value, scaling).transpose(1, 2), None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch.autocast does to the arguments of torch's own attention: RoPE leaves queries and keys in float32."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
