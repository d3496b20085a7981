"""What transformers asks a cache to do with its rows: reorder, select and repeat them.

Indices are checked before anything changes. As many rows as before are exchanged in place, so that addresses stay; for another
number of rows everything is built beside what there is, and then exchanged: where there is no memory for both, nothing changes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..attention.buffers import check_free_bytes
from ..attention.store import in_normal_mode
from ..planning.plan import integer
from ..planning.reading import shown
from .state import locked

if TYPE_CHECKING:
    from .cache import ZigzagCache


@in_normal_mode
@locked
def reorder_cache(self: "ZigzagCache", beam_idx: Tensor) -> None:
    """Row i becomes what row beam_idx[i] was. beam_idx: [rows] int32 or int64; errors as of `batch_select_indices`."""
    self.state.check()
    _select_rows(self, _row_index(beam_idx, self.state.batch, "reorder_cache()"), "reorder_cache()")


@in_normal_mode
@locked
def batch_select_indices(self: "ZigzagCache", indices: Tensor | Sequence[int]) -> None:
    """Keeps the rows `indices`, [rows] int32 or int64, or a mask of bools, [batch].

    Raises:
        ValueError: no rows, another shape. TypeError: another dtype. IndexError: a row that there is not (on a GPU, where this
            would wait for it, such a row ends the CUDA context). MemoryError: none for other rows. Nothing was changed.
    """
    state, what = self.state, "batch_select_indices()"
    state.check()
    mask = indices if isinstance(indices, Tensor) else torch.as_tensor(indices) if _is_mask(indices) else None
    if mask is not None and mask.dtype == torch.bool:
        if state.batch is not None and tuple(mask.shape) != (state.batch,):
            raise ValueError(f"{what} takes a mask of [{state.batch}] bools, one per row; got {list(mask.shape)}")
        indices = mask.nonzero().flatten()
    _select_rows(self, _row_index(indices, state.batch, what), what)


@in_normal_mode
@locked
def batch_repeat_interleave(self: "ZigzagCache", repeats: int) -> None:
    """Every row `repeats` times, one after the other. Raises as `batch_select_indices`."""
    state, what = self.state, "batch_repeat_interleave()"
    state.check()
    repeats = integer("repeats", repeats)
    if not 1 <= repeats <= 1 << 31:
        raise ValueError(f"{what} takes 1 to 2^31 repeats, got {repeats}")
    if state.batch is not None:
        _check_memory(self, state.batch * repeats)  # before so many indices are made
        _select_rows(self, torch.arange(state.batch).repeat_interleave(repeats), what)


def _is_mask(indices) -> bool:
    return isinstance(indices, Sequence) and len(indices) > 0 and all(isinstance(each, bool) for each in indices)


def _row_index(index, batch: int | None, what: str) -> Tensor:
    """[rows] int32 or int64, of rows that there are."""
    try:
        index = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{what} takes row numbers, got {shown(index)}") from None
    if index.dim() != 1:
        raise ValueError(f"{what} takes row numbers of one dimension, got shape {list(index.shape)}")
    if not len(index):
        raise ValueError(f"{what} needs at least one row, got none; use reset() to empty the cache")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{what} takes row numbers in int32 or int64, got {str(index.dtype)[6:]}")
    if batch is not None and not index.is_cuda and (index.min() < 0 or index.max() >= batch):
        raise IndexError(f"{what}: rows must be in [0, {batch}), got {shown(index.tolist())}")
    return index


def _check_memory(cache: "ZigzagCache", batch: int) -> None:
    """Raises MemoryError unless there is room for `batch` rows beside those that there are."""
    needed: dict[torch.device, int] = {}
    for device, size in (each for holder in cache.holders for each in holder.memory_with_rows(batch)):
        needed[device] = needed.get(device, 0) + size
    check_free_bytes(needed)


def _select_rows(cache: "ZigzagCache", index: Tensor, what: str) -> None:
    state = cache.state
    if not state.columns:
        return
    if len(index) == state.batch:
        with state.change(what):
            for holder in cache.holders:
                holder.select_rows(index)
            state.select_rows(index)
        return
    _check_memory(cache, len(index))
    parts = [*cache.holders, state]
    chosen = [part.with_rows(index) for part in parts]
    with state.change(what):
        for part, rows in zip(parts, chosen, strict=True):
            part.take(rows)
