"""The specification: every function of `ops` as a short torch function with the same arguments and the same effect on them.

Tests compare the compiled kernels with these functions in float64; read them to learn what a kernel means. They are written
to be obvious, not fast. Source of the sink + window pattern: StreamingLLM (https://arxiv.org/abs/2309.17453); of the
retrieval/streaming split: DuoAttention (https://arxiv.org/abs/2410.10819). Deviation from DuoAttention: the new token
counts in its own window, and prefill, decode and every chunking of a prompt follow the one rule of `visible`.
"""

import torch
from torch import Tensor


def slot_of(position: Tensor, slots: int, sink: int, window: int) -> Tensor:
    """Slot of each position in a cache of `slots` slots. `window == 0` marks a full cache, where slot = position.

    Of a ring slots >= sink + window: the slots past sink are used in turns. With slack = slots - sink - window it can take back
    its last slack + 1 tokens, by a length that is so much less: what they overwrote no later query sees.
    """
    if window == 0:
        return position
    return torch.where(position < sink, position, sink + (position - sink) % (slots - sink))


def position_of(slots: int, length: int, sink: int, window: int, device=None) -> Tensor:
    """Position of what each slot holds of the `length` tokens of a full cache, or of the first `sink` and last `window`
    tokens of a ring; -1 where there is none: that slot may hold anything, or have no memory. Shape [slots], int64.
    """
    held = torch.full((slots,), -1, dtype=torch.int64, device=device)
    position = torch.arange(length, device=device)
    if window:
        position = position[(position < sink) | (position >= length - window)]
    held[slot_of(position, slots, sink, window)] = position
    return held


def visible(key: Tensor, query: Tensor, sink: int, window: int) -> Tensor:
    """Whether a query position attends a key position: causal, and for a ring only [0, sink) and (query - window, query]."""
    seen = (key >= 0) & (key <= query)
    return seen if window == 0 else seen & ((key < sink) | (query - key < window))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [batch, heads, q_len, head_dim] by tables [batch or 1, q_len, rotary_dim], rounded once to the dtype of x.

    The first rotary_dim dims become x * cos + rotate_half(x) * sin, where rotate_half swaps the halves and negates the new
    first one (RoFormer, https://arxiv.org/abs/2104.09864, in the layout of Llama); the others pass through.
    """
    dim = cos.shape[-1]
    turned, rest = x.double()[..., :dim], x[..., dim:]
    half = torch.cat([-turned[..., dim // 2 :], turned[..., : dim // 2]], -1)
    turned = turned * cos.double()[:, None] + half * sin.double()[:, None]
    return torch.cat([turned.to(x.dtype), rest], -1)


MAX_CODE = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0, torch.uint8: 7.0}  # uint8 holds two int4 codes


def encode(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scale of every vector of x [..., head_dim], as a cache of `dtype` holds them: x ~ code * scale.

    dtype float8_e4m3fn or int8: codes [..., head_dim]; uint8: int4 codes, two a byte, [..., head_dim / 2]. Scale [...] float32:
    the largest magnitude over the largest code. A vector below 2^-80 becomes zeros of scale 2^-24, one that is not finite
    becomes zeros of scale infinity. Float32, every step rounded to nearest even: a kernel gives the same bits.
    """
    x = x.float()
    amax = x.abs().amax(-1)
    amax = torch.where(x.isfinite().all(-1), amax, torch.inf)
    usual = (amax >= 2.0**-80) & amax.isfinite()
    safe, max_code = torch.where(usual, amax, 1.0), MAX_CODE[dtype]
    scale = torch.where(usual, safe / max_code, torch.where(amax.isfinite(), 2.0**-24, torch.inf))
    inverse = torch.full_like(safe, max_code) / safe  # a division: torch turns `number / tensor` into two roundings
    y = torch.where(usual[..., None], x * inverse[..., None], 0.0)
    if dtype == torch.float8_e4m3fn:
        return y.to(dtype), scale
    if dtype == torch.int8:
        return y.round().to(dtype), scale
    nibble = (y.round() + 8).to(dtype)
    return nibble[..., ::2] | nibble[..., 1::2] << 4, scale


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The vectors that codes and scales stand for, [..., head_dim] in float64."""
    if codes.dtype == torch.uint8:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int() - 8
    return codes.double() * scale.double()[..., None]


def stored(x: Tensor, cache: Tensor) -> Tensor:
    """What is attended of new keys or values x: themselves, or what their codes in a quantised cache stand for. Float64."""
    return decode(*encode(x, cache.dtype)) if cache.dtype in MAX_CODE else x.double()


def held(cache: Tensor, scale: Tensor | None, used: Tensor) -> Tensor:
    """Content of the slots `used` [slots] bool of one row's cache [num_kv_heads, slots, ...] in float64, [..., head_dim].

    No other slot is looked at: it may hold anything, or have no memory at all.
    """
    if scale is None:
        return cache[:, used].double()
    return decode(cache.view(torch.uint8)[:, used].view(cache.dtype), scale[:, used])


def rows_of(seq_lens: Tensor, pad: Tensor | None, cache_rows: Tensor | None, batch: int, q_len: int):
    """Batch row, its cache row, tokens held there and leading padding columns, of every row that is not skipped."""
    for b in range(batch):
        row = b if cache_rows is None else int(cache_rows[b])
        if row != -1:
            yield b, row, int(seq_lens[row]), 0 if pad is None else min(max(int(pad[b]), 0), q_len)


def append(
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    pad: Tensor | None = None,
    cache_rows: Tensor | None = None,
    sink: int = 0,
    window: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """`ops.append`: writes the new tokens to their slots; what a ring would overwrite within the chunk is never written.

    Slots past the capacity are skipped. A quantised cache is one of a dtype in `MAX_CODE`; see `encode`.
    """
    slots = k_cache.shape[2]
    if slots == 0:
        return
    for b, row, length, first in rows_of(seq_lens, pad, cache_rows, k_new.shape[0], k_new.shape[2]):
        position = length + torch.arange(k_new.shape[2] - first, device=k_new.device)
        keep = slot_of(position, slots, sink, window) < slots
        if window and position.numel():
            keep &= (position < sink) | (position > position[-1] - (slots - sink))
        slot = slot_of(position[keep], slots, sink, window)
        for cache, scale, new in ((k_cache, k_scale, k_new), (v_cache, v_scale, v_new)):
            vectors = new[b, :, first:][:, keep]
            if scale is None:
                cache[row, :, slot] = vectors
            else:
                codes, scale[row, :, slot] = encode(vectors, cache.dtype)
                cache.view(torch.uint8)[row, :, slot] = codes.view(torch.uint8)


def attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    pad: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    heads: Tensor | None = None,
    cache_rows: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    sink: int = 0,
    window: int = 0,
    scale: float | None = None,
    workspace: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.attention`: attention of the new tokens over the cache and themselves, then append. Computes in float64.

    `workspace` is not used. With a quantised cache new tokens too are attended as their codes, so that every chunking of a
    prompt attends the same keys and values.
    """
    if cos is not None:
        q, k_new = rotate(q, cos, sin), rotate(k_new, cos, sin)
    batch, num_q_heads, q_len, head_dim = q.shape
    group, scale = num_q_heads // k_new.shape[1], head_dim**-0.5 if scale is None else scale
    out = torch.empty_like(q) if out is None else out
    lse = q.new_empty(batch, num_q_heads, q_len, dtype=torch.float32) if lse is None else lse
    kv = torch.arange(k_new.shape[1], device=q.device) if heads is None else heads.long()
    own = (kv[:, None] * group + torch.arange(group, device=q.device)).flatten()
    q, k_new, v_new = q[:, own], k_new[:, kv], v_new[:, kv]
    out[:, own], lse[:, own] = 0.0, -torch.inf
    for b, row, length, first in rows_of(seq_lens, pad, cache_rows, batch, q_len):
        query = length + torch.arange(q_len - first, device=q.device)
        old = position_of(k_cache.shape[2], length, sink, window, q.device) if k_cache.shape[2] else query[:0]
        used = old >= 0
        key = torch.cat([old[used], query])
        parts = ((k_cache, k_scale, k_new), (v_cache, v_scale, v_new))
        k, v = (
            torch.cat([held(cache[row], s if s is None else s[row], used), stored(new[b, :, first:], cache)], 1)
            for cache, s, new in parts
        )
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        logits = q[b, :, first:].double() @ k.transpose(1, 2) * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        logits = logits.masked_fill(~visible(key, query[:, None], sink, window), -torch.inf)
        if sink_logits is not None:  # a key without a value
            logits = torch.cat([logits, sink_logits[own].double()[:, None, None].expand(-1, logits.shape[1], 1)], 2)
            v = torch.nn.functional.pad(v, (0, 0, 0, 1))
        lse[b, own, first:] = logits.logsumexp(-1).to(lse.dtype)
        out[b, own, first:] = (logits.softmax(-1) @ v).to(out.dtype)
    rows = {"pad": pad, "cache_rows": cache_rows}
    append(k_new, v_new, k_cache, v_cache, seq_lens, **rows, sink=sink, window=window, k_scale=k_scale, v_scale=v_scale)
    return out, lse


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """State over the union of two disjoint key sets from the states over each. out [..., head_dim], lse [...]; -inf is empty."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a, weight_b = (lse_a - safe).exp().unsqueeze(-1), (lse_b - safe).exp().unsqueeze(-1)
    out = weight_a * out_a.double() + weight_b * out_b.double()
    return out.to(out_a.dtype), lse.float()
