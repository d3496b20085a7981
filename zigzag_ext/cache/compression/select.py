"""From the attention of a prompt's last tokens to the slots that a layer keeps."""

from collections.abc import Callable

import torch
from torch import Tensor

from .method import PromptCompression
from .observed import Observed

BLOCK = 8192  # keys at a time: logits of 32 heads x 32 queries are 32 MiB


def attention_mass(
    observed: Observed, keys: Callable[[int, int], Tensor], lengths: Tensor, longest: int, block: int = BLOCK
) -> Tensor:
    """Attention that the last tokens of each row pay to each of its tokens, summed over them and over grouped query heads.

    Args:
        observed: queries of the last tokens; those that count.
        keys: keys(start, stop) is [batch, num_kv_heads, stop - start, head_dim] of slots [start, stop).
        lengths: [batch], tokens held. longest: the largest of them.

    Returns:
        [batch, num_kv_heads, longest] float32; 0 where a row holds no token. No tensor of observe x longest elements is made.
    """
    q = observed.q
    batch, num_q_heads, observe, head_dim = q.shape
    num_kv_heads = keys(0, 0).shape[1]
    group = num_q_heads // num_kv_heads
    place = torch.arange(observe, device=q.device) - observe
    none = (place < -observed.valid[:, None]).repeat(1, group)[:, None, :, None]
    position = (lengths[:, None] + place).repeat(1, group)[:, None, :, None]
    q = q.float().reshape(batch, num_kv_heads, group * observe, head_dim) * observed.scale
    starts = range(0, longest, block)

    def logits(start: int) -> Tensor:
        stop = min(start + block, longest)
        hidden = torch.arange(start, stop, device=q.device) > position
        return (q @ keys(start, stop).float().transpose(2, 3)).masked_fill_(hidden, -torch.inf)

    total = torch.full_like(q[..., 0], -torch.inf)
    for start in starts:
        total = torch.logaddexp(total, logits(start).logsumexp(-1))
    total = total[..., None]
    return torch.cat([logits(start).sub_(total).exp_().masked_fill_(none, 0).sum(2) for start in starts], -1)


def select(
    method: PromptCompression,
    mass: Tensor,
    lengths: list[int],
    budgets: list[int],
    mean_of_heads: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[int]]:
    """The slots that every row keeps.

    Args:
        method: its `sink` set. mass: [batch, heads, longest], see `attention_mass`. lengths, budgets: tokens held and kept, of
            each row. mean_of_heads: where processes share the heads of a layer out, the mean over them.

    Returns:
        index [batch, heads or 1, kept] int64, ascending, and the number of tokens that each row keeps of it.
    """
    rows = [_select_row(method, mass[b], n, budgets[b], mean_of_heads) for b, n in enumerate(lengths)]
    kept = [row.shape[-1] for row in rows]
    most = max(kept)
    return torch.stack([torch.nn.functional.pad(row, (0, most - row.shape[-1])) for row in rows]), kept


def _select_row(method: PromptCompression, mass: Tensor, held: int, budget: int, mean_of_heads) -> Tensor:
    """[heads or 1, kept] of one row."""
    heads, sink, unit = (mass.shape[0] if method.per_head else 1), method.sink, method.unit
    if budget >= held:
        return torch.arange(held, device=mass.device).expand(heads, held)
    units, rest = divmod(held - sink - method.observe, unit)
    spare = budget - sink - method.observe
    rest = min(rest, spare)
    scores = method.unit_scores(mass[:, sink : sink + units * unit])
    if not method.per_head:
        scores = scores.mean(0, keepdim=True)
        scores = scores if mean_of_heads is None else mean_of_heads(scores)
    best = scores.topk((spare - rest) // unit, dim=-1).indices.sort(-1).values
    tokens = (sink + best[..., None] * unit + torch.arange(unit, device=mass.device)).flatten(1)
    always = torch.arange(held, device=mass.device).expand(heads, held)
    return torch.cat([always[:, :sink], tokens, always[:, held - method.observe - rest :]], 1)
