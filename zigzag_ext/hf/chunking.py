"""Prompts in chunks inside one forward: all but the last chunk go through the model's body, without logits.

generate()'s own `prefill_chunk_size` starts over at the first token and computes logits per chunk; this serves every turn of a
conversation and any caller that wants the logits of the last tokens only. Both give what one shot gives.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..planning.plan import token_count
from .attention import current
from .cache_argument import cache_argument

TOKEN_ARGUMENTS = ("input_ids", "inputs_embeds")
MAX_CHUNK = 8192  # tokens, over all rows: matrix products with as many rows fill a GPU; 1.5 GB of activations in Llama-3-8B
MIN_CHUNK = 256  # tokens per row; smaller ones read the weights too often
_MEMORY_SHARE = 0.5  # of what is free after the KV buffers
_PER_TOKEN = (*TOKEN_ARGUMENTS, "position_ids", "cache_position", "token_type_ids")  # cut along the tokens
_NEED_ALL = ("labels", "output_hidden_states", "output_router_logits")  # need every token in one forward


def check_chunk(model: nn.Module, chunk) -> int | str | None:
    """The value of `prefill_chunk`, checked. Raises TypeError or ValueError."""
    if chunk is None or chunk == "auto":
        size = chunk
    elif isinstance(chunk, str):
        raise ValueError(f"prefill_chunk must be a number of tokens, 'auto' or None; got '{chunk}'")
    elif (size := token_count("prefill_chunk", chunk)) < 1:
        raise ValueError(f"prefill_chunk must be at least 1 token, got {chunk}")
    if size is not None and model.base_model is model:
        raise ValueError(f"prefill_chunk needs a model with a body and a head; {type(model).__name__} has no body of its own")
    return size


def new_tokens(kwargs: dict) -> tuple[int, int]:
    """Rows and columns of the new tokens among a forward's arguments."""
    tokens = next(kwargs[name] for name in TOKEN_ARGUMENTS if kwargs.get(name) is not None)
    return tokens.shape[0], tokens.shape[1]


def begin(cache, kwargs: dict) -> None:
    """Opens the forward with these arguments on its cache. Raises what `ZigzagCache.begin` raises; ValueError without tokens."""
    batch, q_len = new_tokens(kwargs)
    if not q_len:
        raise ValueError(
            f"no new token: the cache already holds {cache.get_seq_length()} tokens; pass the whole conversation, or reset()"
        )
    cache.begin(batch, q_len, kwargs.get("attention_mask"), kwargs.get("position_ids"))


def prefill_ahead(model: nn.Module, cache, kwargs: dict, chunk: int | str) -> dict:
    """Runs the prompt up to its last chunk, if it is longer than a chunk, and returns the arguments of the rest.

    Args:
        cache: ZigzagCache of this forward. kwargs: the forward's arguments by name.

    Raises:
        ValueError: an argument cannot be cut. What `ZigzagCache.begin` raises for the whole prompt, before anything is written.
    """
    batch, q_len = new_tokens(kwargs)
    keep = kwargs.get("logits_to_keep", 0)
    needed = [name for name in _NEED_ALL if kwargs.get(name) is not None and kwargs[name] is not False]
    wants_all = needed or not isinstance(keep, int) or keep < 1
    keeps_nothing = all(value is not cache for value in kwargs.values())
    if wants_all or keeps_nothing or q_len <= (MIN_CHUNK if chunk == "auto" else chunk):
        return kwargs
    seen, cut = cache.get_seq_length(), _cutter(kwargs)
    begin(cache, kwargs)  # checks the whole prompt, and makes room for it
    cache.end(failed=True)
    size = automatic_chunk(model, cache, batch) if chunk == "auto" else chunk
    first_kept = min(q_len - keep, (q_len - 1) // size * size)
    ends = [*range(size, first_kept, size), first_kept] if first_kept > 0 else []
    for start, end in zip([0, *ends], ends, strict=False):
        _run_body(model.base_model, cache, cut(start, end, seen), batch, end - start)
    return kwargs | cut(first_kept, q_len, seen) if ends else kwargs


def _run_body(body: nn.Module, cache, kwargs: dict, batch: int, q_len: int) -> None:
    cache.begin(batch, q_len, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    current.cache, failed = cache, True
    try:
        body(**kwargs, **cache_argument(body, cache), use_cache=True)
        failed = False
    finally:
        current.cache = None
        cache.end(failed)


def _cutter(kwargs: dict) -> Callable[[int, int, int], dict]:
    """cut(start, end, seen): arguments that differ from chunk to chunk, for columns [start, end) after `seen` earlier ones."""
    tensors = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    if unknown := sorted(tensors.keys() - {*_PER_TOKEN, "attention_mask"}):
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
    """
    config, element = model.config, model.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    experts = (getattr(config, "num_experts_per_tok", None) or 0) * (getattr(config, "moe_intermediate_size", None) or inner)
    token_bytes = element * (8 * config.hidden_size + 4 * max(inner, experts))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    pending = sum(layer.slots for layer in cache.layers if not layer.is_initialized) * batch * 2 * heads * head_dim * element
    free = min(_free_bytes(device) for device in {parameter.device for parameter in model.parameters()}) - pending
    fits = max(int(free * _MEMORY_SHARE / token_bytes), 1)
    tokens = 1 << (min(fits, MAX_CHUNK) // batch or 1).bit_length() - 1
    return max(tokens, MIN_CHUNK)


def _free_bytes(device: torch.device) -> int:
    """What new tensors could take: the GPU's free memory and what torch holds unused; on a CPU the system's available memory."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
