"""The attention and mask functions registered with transformers under the name "zigzag".

What attends is `zigzag_ext.cache.attending.current()`, one per thread: a keyword argument would not do, since some families
(Nemotron, StableLM) do not hand theirs down to the attention.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import causal_mask_function, sliding_window_overlay

from ..attention import ops
from ..attention.chunk import LogitTerms
from ..cache.attending import current
from .cache_argument import tested_range

NAME = "zigzag"

# Arguments that reach an attention function and change nothing about what it has to compute, as a cache does not. Any other one
# that is not None or False raises: it may stand for softcap, learned sinks, packed sequences, position biases, sparse indices ...
_HARMLESS = {
    "cache_position",
    "ignore_index",
    "layer_idx",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "shift_labels",
    "sliding_window",  # what the mask says is compared
    "token_type_ids",
    "use_cache",
}


class MaskNote:
    """Stands in for a mask that is not plainly causal: a sliding window of `window` tokens, or one that no kernel serves.

    Some models make masks and use none, so only its use raises.
    """

    def __init__(self, name: str, window: int = 0):
        self.name, self.window = name, window

    def __getitem__(self, columns) -> "MaskNote":
        """Of the last queries only, as Gemma 4 cuts its masks: it says the same of each query."""
        return self


_SLIDING = sliding_window_overlay(1).__code__
_SPAN_IDS = ("block_sequence_ids", "image_group_ids")  # [batch, tokens] of functions that let spans see themselves; -1: in none


def _composed(mask_function) -> tuple[str, tuple]:
    """How transformers has composed a mask, by "and_masks" or "or_masks", and of what; of others the name and nothing."""
    code, cells = getattr(mask_function, "__code__", None), getattr(mask_function, "__closure__", None) or ()
    name = getattr(mask_function, "__qualname__", repr(mask_function)).partition(".<locals>")[0]
    if code is None or code.co_freevars != ("mask_functions",):
        return name, ()
    return name, tuple(cells[0].cell_contents)


def _adds_nothing(mask_function) -> bool:
    """Whether a function lets the tokens of spans see each other, and there are no spans; waits for the device."""
    names = getattr(getattr(mask_function, "__code__", None), "co_freevars", ())
    spans = [mask_function.__closure__[names.index(name)].cell_contents for name in _SPAN_IDS if name in names]
    return len(spans) == 1 and not (spans[0] >= 0).any()


def _simplified(mask_function):
    """The same mask without unions with nothing, which prompts of text have in models whose images see themselves."""
    name, parts = _composed(mask_function)
    if name == "or_masks" and len(left := [part for part in parts if not _adds_nothing(part)]) == 1:
        return _simplified(left[0])
    return mask_function


def window_of(mask_function) -> int:
    """Tokens that a query sees under "causal and a sliding window" as transformers composes the two; 0 for anything else."""
    name, parts = _composed(_simplified(mask_function))
    sliding = [part for part in parts if getattr(part, "__code__", None) is _SLIDING]
    if name != "and_masks" or len(parts) != 2 or len(sliding) != 1 or causal_mask_function not in map(_simplified, parts):
        return 0
    return sliding[0].__closure__[0].cell_contents


def _described(mask_function) -> str:
    name, parts = _composed(mask_function)
    return f"{name}({', '.join(map(_described, parts))})" if parts else name


def mask(*args, mask_function=causal_mask_function, local_size: int | None = None, **kwargs) -> MaskNote | None:
    """Builds nothing: causality and windows are in the kernels, padding is read from the 2-D mask by `Forward`.

    The compiler cannot look into a mask function. What it traces is a step behind a prompt, whose mask was looked into.
    """
    if mask_function is causal_mask_function:
        return None
    if ops.is_traced():
        return MaskNote("of a compiled step", local_size or 0)
    if _simplified(mask_function) is causal_mask_function:
        return None
    return MaskNote(_described(mask_function), window_of(mask_function))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """One launch: attention over the layer's cache and the new tokens, and the append of the new tokens.

    softcap, s_aux: as families hand them to attention functions, the cap of logits and one sink logit per query head.

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
    if getattr(module, "layer_idx", None) is None:
        raise ValueError(f"{name} is no layer of the text decoder (it has no layer_idx), which alone is served")
    _check_mask(name, module.layer_idx, attention_mask, entry.native_window(module.layer_idx))
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
    for term, given in (("sinks", s_aux), ("attn_logit_softcapping", softcap)):
        if getattr(module, term, None) is not None and given is None:
            raise ValueError(f"{name} has {term} and does not hand them to its attention function")
    query, key, value = _autocast(query, key, value)
    terms = LogitTerms(softcap or 0.0, None if s_aux is None else s_aux.detach().float().contiguous())
    return entry.attend(module.layer_idx, query, key, value, scaling, terms).transpose(1, 2), None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What torch.autocast does to the arguments of torch's own attention: RoPE leaves queries and keys in float32."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) for t in tensors)


def _check_mask(name: str, layer: int, given, window: int) -> None:
    """Raises ValueError unless the model asks for the mask that the cache has the layer for: causal, within `window` if not 0."""
    if given is not None and not getattr(given, "window", 0):
        what = given.name if isinstance(given, MaskNote) else f"a {type(given).__name__}"
        raise ValueError(
            f"{name} needs the attention mask {what}; zigzag attention serves causal masks with padding, and sliding windows: "
            "no tokens that see later ones, as those of one image do in some models; several documents need a row each, padded"
        )
    if (asked := 0 if given is None else given.window) != window:
        own, planned = (f"a sliding window of {each} tokens" if each else "full causal attention" for each in (asked, window))
        raise ValueError(f"{name}, layer {layer}, asks for {own}, its config says {planned}")


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)
