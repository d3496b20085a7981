"""What a layer is told about a forward beside its own queries, keys and values."""

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Chunk(NamedTuple):
    """What all layers of a forward share.

    seq_lens: [batch] int32 each, tokens held per row before: of most stores the first, see `LayerStore`. pad: [batch] int32,
    leading columns to skip, or None. workspace: scratch of the ops. past: what every row has seen, if the host knows that it is
    the same number; else None. started: whether no row can be empty. cos, sin: tables of RoPE, see `ops.attention`. decodes:
    whether it continues texts rather than reads a prompt: it takes our kernels, and rules for prompts do not apply. left_out:
    [len(seq_lens), batch], tokens by which `seq_lens` count less than their first row; None: the same. cache_rows: [batch] int32,
    rows of the caches and of `seq_lens` that the batch has, see `ops.attention`; None: the first. row: the only one, if known.
    """

    seq_lens: tuple[Tensor, ...]
    pad: Tensor | None
    workspace: Tensor
    past: int | None = None
    started: bool = True
    cos: Tensor | None = None
    sin: Tensor | None = None
    decodes: bool = False
    left_out: np.ndarray | None = None
    cache_rows: Tensor | None = None
    row: int | None = None

    def past_of(self, lengths: int) -> int | None:
        """Tokens that every row holds by `seq_lens[lengths]`, if the host knows that it is the same number; else None."""
        if self.past is None or self.left_out is None:
            return self.past
        less = self.left_out[lengths]
        return self.past - int(less[0]) if (less == less[0]).all() else None

    def rows_of(self, t: Tensor, batch: int) -> Tensor:
        """Those of t [cache rows, ...] that the batch has: a view, but a copy for several of `cache_rows`."""
        if self.row is not None:
            return t[self.row : self.row + 1]
        if self.cache_rows is not None:
            return t.index_select(0, self.cache_rows.clamp(min=0))  # of a row that is skipped, -1, any will do
        return t[:batch]


class LogitTerms(NamedTuple):
    """What a family does to logits beside scaling them, see `ops.attention`."""

    softcap: float = 0.0
    sink_logits: Tensor | None = None


NO_TERMS = LogitTerms()
