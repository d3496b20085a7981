"""Key smoothing: a constant is subtracted from the keys of a row and head before they are quantised.

All logits of a query move by the same q . offset then, so that softmax, and every merge of partial results over one cache, stays
what it was; only the log-sum-exp moves. Keys of most models have channels of a large constant value (of low RoPE frequency, or
from biases), which decide the scale of every vector and leave few codes to what differs between tokens.

Source: SageAttention (https://arxiv.org/abs/2410.02367) subtracts the mean key of the whole sequence; that keys have outliers in
few channels is shown in KIVI (https://arxiv.org/abs/2402.02750) and KVQuant (https://arxiv.org/abs/2401.18079). Deviation: the
offset is the mean of a row's first tokens and stays until the cache is emptied, so that codes never change afterwards.
"""

import torch
from torch import Tensor

from . import ops

# Tokens of a row that its offset is the mean of: cutting a prompt into chunks of that many or more moves no bit of the codes.
TOKENS = 128


def new_offset(k: Tensor) -> Tensor:
    """Zeros [batch, num_kv_heads, 1, head_dim] for keys like k [batch, num_kv_heads, q_len, head_dim]."""
    return k.new_zeros(k.shape[0], k.shape[1], 1, k.shape[3])


def sets_offsets(q_len: int, all_started: bool) -> bool:
    """Whether a chunk sets offsets: one that a prompt kernel takes, where a row may be empty.

    A few tokens say little about the mean, the first one least of all. So rows that start with decode steps are not smoothed, and
    a decode step, which may be a captured graph, has nothing to compute.
    """
    return q_len > ops.MAX_DECODE_QUERIES and not all_started


@torch.no_grad()  # the ops refuse autograd later: the offset must not have become part of its graph
def set_offsets(offset: Tensor, k: Tensor, seq_lens: Tensor, pad: Tensor | None) -> None:
    """Sets, in place, the offset of rows that are empty to the mean of their first `TOKENS` keys in this chunk.

    offset [batch, num_kv_heads, 1, head_dim]; k [batch, num_kv_heads, q_len, head_dim]; seq_lens [batch] tokens held before; pad
    [batch] leading columns to skip. The mean is in float32, rounded to the dtype of k. Waits for nothing.
    """
    first = torch.zeros_like(seq_lens) if pad is None else pad
    column = first[:, None] + torch.arange(min(TOKENS, k.shape[2]), device=k.device)
    counted = (column < k.shape[2])[:, None, :, None]
    column = column.clamp(max=k.shape[2] - 1)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    total = torch.where(counted, k.gather(2, column.long()).float(), 0.0).sum(2, keepdim=True)
    mean = (total / counted.sum(2, keepdim=True).clamp_min(1)).to(k.dtype)
    empty = (seq_lens == 0)[:, None, None, None]
    offset.copy_(torch.where(empty, mean, offset))
