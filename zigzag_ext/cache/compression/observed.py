"""Observed: the queries of a prompt's last tokens, which a compression asks what to keep."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Observed:
    """Of one layer.

    q: [batch, num_q_heads, n, head_dim], rotated; the last one is that of the row's last token. valid: [batch] int64, of the n
    queries of a row the last valid[i] are of its last tokens, those before them mean nothing. scale: on q . k.
    """

    q: Tensor
    valid: Tensor
    scale: float

    @classmethod
    def of(cls, q: Tensor, pad: Tensor | None, scale: float, most: int, before: "Observed | None") -> "Observed":
        """The last `most` queries: of q [batch, num_q_heads, q_len, head_dim], whose first pad [batch] columns are padding, and
        of those before it."""
        q_len = q.shape[2]
        valid = torch.full((q.shape[0],), q_len, device=q.device) if pad is None else q_len - pad.long()
        if before is not None and (pad is not None or q_len < most):
            held = before.q.shape[2]
            back = torch.arange(min(most, held + q_len) - 1, -1, -1, device=q.device)  # 0: the last one
            older = (held - 1 - (back - valid[:, None])).clamp(min=0)
            column = torch.where(back < valid[:, None], held + q_len - 1 - back, older)
            q = _columns(torch.cat([before.q, q], 2), column)
            valid = valid + before.valid
        q = q[:, :, -most:].clone()
        return cls(q, valid.clamp(max=q.shape[2]), scale)

    def without(self, removed: Tensor | int) -> "Observed":
        """After the last removed[i] tokens of row i were taken back."""
        removed = removed.to(self.q.device).long() if isinstance(removed, Tensor) else torch.full_like(self.valid, removed)
        column = torch.arange(self.q.shape[2], device=self.q.device) - removed[:, None]
        return Observed(_columns(self.q, column.clamp(min=0)), (self.valid - removed).clamp(min=0), self.scale)

    def select_rows(self, index: Tensor) -> "Observed":
        """Row i becomes what row index[i] was."""
        index = index.to(self.q.device)
        return Observed(self.q.index_select(0, index), self.valid.index_select(0, index), self.scale)

    def last(self, tokens: int) -> "Observed":
        """The queries of the last `tokens` tokens."""
        q = self.q[:, :, -tokens:]
        return Observed(q, self.valid.clamp(max=q.shape[2]), self.scale)


def _columns(q: Tensor, column: Tensor) -> Tensor:
    """q [batch, heads, columns, head_dim] in the order column [batch, n]."""
    return q.gather(2, column[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
