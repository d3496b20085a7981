"""Full and sink + window attention over a whole prompt in plain torch: on any device and dtype, and differentiable.

What methods of identification compare (the kernels have no backward pass).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.reference import visible


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Full causal attention. query [batch, num_q_heads, n, head_dim], key and value [batch, num_kv_heads, n, head_dim]."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


def banded(query: Tensor, key: Tensor, value: Tensor, scale: float, sink: int, window: int) -> Tensor:
    """Attention to the first `sink` and last `window` tokens. Shapes as in `causal`; work and memory grow linearly with n.

    Queries are taken in blocks. Each block, with all query heads of a group, attends to the sink and to the keys that one of
    its queries can see.
    """
    batch, num_q_heads, n, head_dim = query.shape
    kv_heads = key.shape[1]
    if n <= sink + window:
        return causal(query, key, value, scale)
    block = min(max(window, 64), 512)
    blocks = -(-n // block)
    padding = blocks * block - n
    queries = F.pad(query, (0, 0, 0, padding)).view(batch, kv_heads, -1, blocks, block, head_dim)

    def seen(x: Tensor) -> Tensor:
        near = F.pad(x, (0, 0, window, padding)).unfold(2, window + block, block).transpose(-1, -2)
        return torch.cat([x[:, :, None, :sink].expand(-1, -1, blocks, -1, -1), near], dim=3).flatten(0, 1)

    group = queries.shape[2]
    folded = queries.transpose(2, 3).reshape(batch * kv_heads, blocks, group * block, head_dim)
    mask = _mask(blocks, block, group, sink, window, query.device)
    out = F.scaled_dot_product_attention(folded, seen(key), seen(value), attn_mask=mask, scale=scale)
    out = out.view(batch, kv_heads, blocks, group, block, head_dim).transpose(2, 3)
    return out.reshape(batch, num_q_heads, blocks * block, head_dim)[:, :, :n]


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # kept across calls, so it must be usable where gradients are wanted
def _mask(blocks: int, block: int, group: int, sink: int, window: int, device: torch.device) -> Tensor:
    """[1, blocks, group * block, sink + window + block] bool: what each query of each block sees of what its block is given."""
    starts = torch.arange(blocks, device=device)[:, None] * block
    near = starts + torch.arange(-window, block, device=device)
    near = near.masked_fill(near < sink, -1)  # these come with the sink
    keys = torch.cat([torch.arange(sink, device=device).expand(blocks, -1), near], dim=1)
    queries = starts + torch.arange(block, device=device)
    seen = visible(keys[:, None], queries[:, :, None], sink, window)
    return seen.repeat(1, group, 1)[None]
