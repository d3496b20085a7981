"""Plans that stream single KV heads, as plain torch attention over a whole prompt: what a layer-exclusive plan is compared with.

DuoAttention (https://arxiv.org/abs/2410.10819) streams heads. The caches of this package stream layers only, so a head-level
plan can be evaluated here, teacher-forced, but not decoded with. Works on any device and dtype, and is differentiable.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from ..plan import Plan, token_count
from ..reference import visible
from .probe import Attend


@dataclass(frozen=True)
class HeadPlan:
    """Which KV heads keep every token. `retrieval` [layers][kv_heads] of bool; the other heads keep `sink` + `window` tokens.

    Raises:
        ValueError: `retrieval` is empty or ragged, `sink` < 0 or `window` < 1.
    """

    retrieval: tuple[tuple[bool, ...], ...]
    sink: int
    window: int

    def __post_init__(self):
        rows = tuple(tuple(bool(head) for head in layer) for layer in self.retrieval)
        if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
            raise ValueError(f"retrieval must be [layers][kv_heads], all layers alike, got rows of {[len(row) for row in rows]}")
        if token_count("sink", self.sink) < 0 or token_count("window", self.window) < 1:
            raise ValueError(f"a plan needs sink >= 0 and window >= 1, got sink {self.sink} and window {self.window}")
        object.__setattr__(self, "retrieval", rows)

    @classmethod
    def from_scores(cls, scores: ArrayLike, heads: int, sink: int, window: int) -> "HeadPlan":
        """The `heads` KV heads with the largest scores retrieve; of equal scores the first in layer and head order."""
        matrix = np.asarray(scores, dtype=np.float64)
        if not 0 <= heads <= matrix.size:
            raise ValueError(f"heads must lie between 0 and {matrix.size}, got {heads}")
        best = np.zeros(matrix.size, dtype=bool)
        best[np.argsort(-matrix.ravel(), kind="stable")[:heads]] = True
        return cls(best.reshape(matrix.shape).tolist(), sink, window)

    @classmethod
    def from_plan(cls, plan: Plan, kv_heads: int) -> "HeadPlan":
        """The same plan, head by head."""
        return cls(tuple((kind == "retrieval",) * kv_heads for kind in plan.kinds), plan.sink, plan.window)

    @property
    def retrieval_ratio(self) -> float:
        """Share of the KV heads that keep every token."""
        return float(np.mean(self.retrieval))


def attend_heads(plan: HeadPlan) -> Attend:
    """The attention function of `probe` that runs a head-level plan."""

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        kinds = plan.retrieval[layer]
        if len(kinds) != key.shape[1]:
            raise ValueError(f"the plan has {len(kinds)} KV heads per layer, layer {layer} of the model has {key.shape[1]}")
        if all(kinds):
            return causal(query, key, value, scale)
        if not any(kinds):
            return banded(query, key, value, scale, plan.sink, plan.window)
        grouped = query.unflatten(1, (key.shape[1], -1))
        out = torch.empty_like(grouped)
        for kind in (True, False):
            heads = [head for head, other in enumerate(kinds) if other == kind]
            part = (grouped[:, heads].flatten(1, 2), key[:, heads], value[:, heads], scale)
            result = causal(*part) if kind else banded(*part, plan.sink, plan.window)
            out[:, heads] = result.unflatten(1, (len(heads), -1))
        return out.flatten(1, 2)

    return attend


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
