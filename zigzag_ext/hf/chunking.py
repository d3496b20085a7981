"""Prompts in chunks inside one forward: all but the last chunk go through the model's body, without logits.

generate()'s own `prefill_chunk_size` starts over at the first token and computes logits per chunk; this serves every turn of a
conversation and any caller that wants the logits of the last tokens only. Both give what one shot gives.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ..attention.buffers import free_bytes
from ..cache.forward import Forward
from ..planning.layers import geometries, text_config
from ..planning.plan import token_count
from .images import deltas_holder, tensors_in
from .own_config import is_composite
from .ranks import Ranks

TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds")
MAX_CHUNK = 8192  # tokens, over all rows: matrix products with as many rows fill a GPU; 1.5 GB of activations in Llama-3-8B
MIN_CHUNK = 256  # tokens per row; smaller ones read the weights too often
_MEMORY_SHARE = 0.5  # of what is free after the KV buffers
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")  # [batch, tokens], 0 for text
_PER_TOKEN = (*TOKEN_ARGUMENTS, "position_ids", "cache_position", *_TOKEN_TYPES)  # cut along the tokens
_NEED_ALL = ("labels", "shift_labels", "output_hidden_states", "output_router_logits")  # need every token in one forward


def check_chunk(model: nn.Module, chunk) -> int | str | None:
    """The value of `prefill_chunk`, checked. Raises TypeError or ValueError."""
    if chunk is None or chunk == "auto":
        size = chunk
    elif isinstance(chunk, str):
        raise ValueError(f"prefill_chunk must be a number of tokens, 'auto' or None; got '{chunk}'")
    elif (size := token_count("prefill_chunk", chunk)) < 1:
        raise ValueError(f"prefill_chunk must be at least 1 token, got {chunk}")
    if size not in (None, "auto") and model.base_model is model:
        raise ValueError(f"prefill_chunk needs a model with a body and a head; {type(model).__name__} has no body of its own")
    return size


def new_tokens(kwargs: dict) -> tuple[int, int]:
    """Rows and columns of the new tokens among a forward's arguments."""
    tokens = next(kwargs[name] for name in TOKEN_ARGUMENTS if kwargs.get(name) is not None)
    return tokens.shape[0], tokens.shape[1]


def pieces_of(model: nn.Module, forward: Forward, kwargs: dict, chunk: int | str | None) -> list[dict]:
    """The arguments of each pass through the model that the forward takes: the last one for the model, others for its body.

    Args:
        forward: open. kwargs: its arguments by name. chunk: most tokens per row and pass, "auto", or None: one pass.

    A prompt with images is one pass: the model merges their features into it.

    Raises:
        ValueError: an argument cannot be cut (with "auto", and in composite models, such a forward is one pass).
    """
    batch, q_len = new_tokens(kwargs)
    keep = kwargs.get("logits_to_keep", 0)
    needed = [name for name in _NEED_ALL if kwargs.get(name) is not None and kwargs[name] is not False]
    wants_all = needed or not isinstance(keep, int) or keep < 1
    automatic = chunk == "auto"
    if chunk is None or wants_all or not forward.state.stores or q_len <= (MIN_CHUNK if automatic else chunk):
        return [kwargs]
    if automatic and model.base_model is model:
        return [kwargs]
    if (automatic or is_composite(model)) and _uncuttable(kwargs):
        return [kwargs]
    if kwargs.get("position_ids") is None and deltas_holder(model) is not None:  # made by the model, from the whole prompt
        return [kwargs]
    types = [kwargs[name] for name in _TOKEN_TYPES if kwargs.get(name) is not None]
    if is_composite(model) and any(bool(each.any()) for each in types):  # of images, in inputs_embeds; waits for the device
        return [kwargs]
    seen, cut = forward.columns, _cutter(kwargs)
    size = automatic_chunk(model, forward.cache, batch) if automatic else chunk
    least = 2 if forward.cache.states else 1  # columns of a piece: transformers does not mask padding for states in one of 1
    size = max(size, least)
    first_kept = min(q_len - max(keep, least), (q_len - 1) // size * size)
    if first_kept < least:
        return [kwargs]
    ends = [*range(size, first_kept - least + 1, size), first_kept]
    cache = {name: value for name, value in kwargs.items() if value is forward.cache}
    body = [cut(start, end, seen) | cache | {"use_cache": True} for start, end in zip([0, *ends], ends, strict=False)]
    return [*body, kwargs | cut(first_kept, q_len, seen)]


def _uncuttable(kwargs: dict) -> list[str]:
    """Names of a forward's arguments that have tensors which are not of its tokens."""
    names = {name for name, value in kwargs.items() if any(True for _ in tensors_in(value))}
    return sorted(names - {*_PER_TOKEN, "attention_mask"})


def _cutter(kwargs: dict) -> Callable[[int, int, int], dict]:
    """cut(start, end, seen): arguments that differ from chunk to chunk, for columns [start, end) after `seen` earlier ones."""
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    if unknown := _uncuttable(kwargs):
        raise ValueError(f"prefill_chunk cannot cut the argument {', '.join(unknown)}; pass it without prefill_chunk")

    def cut(start: int, end: int, seen: int) -> dict:
        pieces = {}
        for name, value in tensors.items():
            if name == "attention_mask":
                pieces[name] = value[:, : seen + end]
            else:
                pieces[name] = value.narrow(1 if name == "inputs_embeds" else value.dim() - 1, start, end - start)
        return pieces

    return cut


def automatic_chunk(model: nn.Module, cache, batch: int) -> int:
    """Tokens per row: the largest power of two whose activations fit in half of the memory that is free beside the KV buffers.

    At most MAX_CHUNK over all rows, at least MIN_CHUNK. The activations of a layer's widest point, per token: about eight
    tensors of the hidden size (residual, norm, q, k, v, rotated q and k, attention output) and four of the MLP's inner size.
    Ranks that share the model out take the least of theirs.
    """
    config, element = text_config(model.config), model.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = max(inner) if isinstance(inner, list | tuple) else inner  # of Gemma 3n one for each layer
    experts = (getattr(config, "num_experts_per_tok", None) or 0) * (getattr(config, "moe_intermediate_size", None) or inner)
    token_bytes = element * (8 * config.hidden_size + 4 * max(inner, experts))
    pending = sum(
        store.bytes_for(cache.state.capacity, batch, size.kv_heads, size.head_dim, element)
        for layer, size in zip(cache.layers, geometries(config), strict=True)
        for store in layer.stores
        if not store.is_allocated
    )
    free = min(free_bytes(device) for device in {parameter.device for parameter in model.parameters()}) - pending
    fits = max(int(free * _MEMORY_SHARE / token_bytes), 1)
    if (ranks := Ranks.of(model)) is not None:
        fits = ranks.least(fits)
    tokens = 1 << (min(fits, MAX_CHUNK) // batch or 1).bit_length() - 1
    return max(tokens, MIN_CHUNK)
