"""The specification: every op as a short torch function with the same arguments and the same effect on them.

Tests compare the compiled kernels with these functions in float64; read them to learn what a kernel means. They are written
to be obvious, not fast. Source of the sink + window pattern: StreamingLLM (https://arxiv.org/abs/2309.17453); of the
retrieval/streaming split: DuoAttention (https://arxiv.org/abs/2410.10819). Deviation from DuoAttention: the new token
counts in its own window, and prefill, decode and every chunking of a prompt follow the one rule of `visible`.
"""

import torch
from torch import Tensor


def slot_of(position: Tensor, sink: int, window: int) -> Tensor:
    """Cache slot of each position. `window == 0` marks a full cache, where slot = position."""
    if window == 0:
        return position
    return torch.where(position < sink, position, sink + (position - sink) % window)


def position_of(slots: int, length: int, sink: int, window: int, device=None) -> Tensor:
    """Position held by each of `slots` slots after `length` tokens, -1 where nothing was written. Shape [slots], int64."""
    held = torch.full((slots,), -1, dtype=torch.int64, device=device)
    position = torch.arange(length, device=device)
    if window:
        position = position[(position < sink) | (position >= length - window)]
    held[slot_of(position, sink, window)] = position
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


def append_(
    k_new: Tensor, v_new: Tensor, k_cache: Tensor, v_cache: Tensor, seq_lens: Tensor, pad: Tensor | None, sink: int, window: int
) -> None:
    """Writes the new tokens of each row to their slots; what a ring would overwrite within the chunk is never written.

    k_new, v_new [batch, num_kv_heads, q_len, head_dim]; k_cache, v_cache [batch, num_kv_heads, slots, head_dim];
    seq_lens [batch] tokens cached before; pad [batch] leading columns of the chunk to skip. Slots past the capacity are skipped.
    """
    for b in range(k_new.shape[0]):
        first = int(pad[b]) if pad is not None else 0
        position = int(seq_lens[b]) + torch.arange(k_new.shape[2] - first, device=k_new.device)
        keep = slot_of(position, sink, window) < k_cache.shape[2]
        if window and position.numel():
            keep &= (position < sink) | (position > position[-1] - window)
        slot = slot_of(position[keep], sink, window)
        k_cache[b, :, slot] = k_new[b, :, first:][:, keep]
        v_cache[b, :, slot] = v_new[b, :, first:][:, keep]


def attention_(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    pad: Tensor | None,
    sink: int,
    window: int,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the new tokens over the cache and themselves, then append. Computes in float64.

    q [batch, num_q_heads, q_len, head_dim]; cos, sin as in `rotate`, or None; the rest as in `append_`. Returns out like q
    and lse [batch, num_q_heads, q_len] float32 (natural logarithm); padding columns give 0 and -inf.
    """
    if cos is not None:
        q, k_new = rotate(q, cos, sin), rotate(k_new, cos, sin)
    batch, num_q_heads, q_len, head_dim = q.shape
    group = num_q_heads // k_new.shape[1]
    out = torch.zeros(batch, num_q_heads, q_len, head_dim, dtype=torch.float64, device=q.device)
    lse = torch.full((batch, num_q_heads, q_len), -torch.inf, dtype=torch.float64, device=q.device)
    for b in range(batch):
        first, length = (int(pad[b]) if pad is not None else 0), int(seq_lens[b])
        query = length + torch.arange(q_len - first, device=q.device)
        old = position_of(k_cache.shape[2], length, sink, window, q.device) if k_cache.shape[2] else query[:0]
        used = old >= 0
        key = torch.cat([old[used], query])
        k = torch.cat([k_cache[b][:, used], k_new[b, :, first:]], 1).double().repeat_interleave(group, 0)
        v = torch.cat([v_cache[b][:, used], v_new[b, :, first:]], 1).double().repeat_interleave(group, 0)
        logits = q[b, :, first:].double() @ k.transpose(1, 2) * scale
        logits = logits.masked_fill(~visible(key, query[:, None], sink, window), -torch.inf)
        lse[b, :, first:] = logits.logsumexp(-1)
        out[b, :, first:] = logits.softmax(-1) @ v
    append_(k_new, v_new, k_cache, v_cache, seq_lens, pad, sink, window)
    return out.to(q.dtype), lse.float()


def attention_heads_(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    pad: Tensor | None,
    heads: Tensor,
    out: Tensor,
    lse: Tensor,
    sink: int,
    window: int,
    scale: float,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> None:
    """`attention_` of the KV heads `heads` [n] and their query heads, whose out and lse it writes.

    k_cache, v_cache [batch, n, slots, head_dim]; the others hold all heads.
    """
    group = q.shape[1] // k_new.shape[1]
    kv = heads.long()
    own = (kv[:, None] * group + torch.arange(group, device=kv.device)).flatten()
    tensors = (q[:, own], k_new[:, kv], v_new[:, kv], k_cache, v_cache, seq_lens, pad)
    out[:, own], lse[:, own] = attention_(*tensors, sink, window, scale, cos, sin)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """State over the union of two disjoint key sets from the states over each. out [..., head_dim], lse [...]; -inf is empty."""
    lse = torch.logaddexp(lse_a.double(), lse_b.double())
    safe = lse.masked_fill(lse == -torch.inf, 0.0)
    weight_a, weight_b = (lse_a - safe).exp().unsqueeze(-1), (lse_b - safe).exp().unsqueeze(-1)
    out = weight_a * out_a.double() + weight_b * out_b.double()
    return out.to(out_a.dtype), lse.float()
