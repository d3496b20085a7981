"""HeldTokens: which token stands in each column of a cache, and what masks of short forwards got wrong, without waiting."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..attention.store import in_normal_mode
from .rows import Rows

SKIPPED, UNKNOWN = -1, -2  # in the place of an id: a column that the row left out; a token of which nothing is known
_CHANGED, _SKIPPED_AHEAD, _SKIPPED_ALONE = 1, 2, 3
_ERRORS = {
    _CHANGED: "attention_mask masks other tokens than those the cache left out before: start from an empty cache",
    _SKIPPED_AHEAD: "attention_mask leaves new tokens out right after crop() or a failure, while rings hold those taken back",
    _SKIPPED_ALONE: "attention_mask leaves a row out of a forward of one token, which recurrent and convolution states take in "
    "all the same: give the row a token, or the forward more columns",
}


class HeldTokens:
    """ids [batch, columns] int32 on the device, with room to grow: SKIPPED or UNKNOWN where there is none, and for tokens that
    came as embeddings their `fingerprints`, which are less.

    images_end: columns up to the end of the latest forward with images, whose tokens have the ids of any other image's. deltas:
    [batch, 1], of a model with M-RoPE: how far the next position is from the number of tokens (`rope_deltas`).
    """

    def __init__(self):
        self.ids: Tensor | None = None
        self.columns = self.images_end = 0
        self.deltas: Tensor | None = None
        self.fault: Tensor | None = None  # 0-d int64 on the device: the largest fault that a short forward has found
        self.fetched: tuple[Tensor, torch.cuda.Event] | None = None  # its copy on the way to the host

    def __getstate__(self) -> dict:
        return {**self.__dict__, "fetched": None}  # an event cannot be copied; the next forward fetches again

    @in_normal_mode
    def note(self, ids: Tensor | None, hidden: Tensor | None, batch: int, q_len: int, device: torch.device, start: int) -> None:
        """Columns from `start` on are `ids` [batch, q_len], None if nobody knows them, less those of `hidden`, likewise."""
        self._make_room(batch, start + q_len, device)
        place = self.ids[:, start : start + q_len]
        if ids is None:
            place.fill_(UNKNOWN)
        else:
            place.copy_(ids)
        if hidden is not None:
            place.masked_fill_(hidden.to(place.device), SKIPPED)
        self.columns = start + q_len

    def _make_room(self, batch: int, columns: int, device: torch.device) -> None:
        if self.ids is not None and self.ids.shape[1] >= columns:
            return
        new = torch.empty(batch, max(256, 1 << (columns - 1).bit_length()), dtype=torch.int32, device=device)
        if self.ids is not None:
            new[:, : self.columns] = self.ids[:, : self.columns]
        self.ids = new

    @in_normal_mode
    def note_rows(self, ids: Tensor | None, counts: np.ndarray, q_len: int, device: torch.device, rows: Rows) -> None:
        """As `note`, where row i gets the last counts[i] of its `q_len` columns, behind its own end in `rows`.

        Columns that only longer rows have are SKIPPED.
        """
        self._make_room(len(counts), rows.columns + q_len, device)
        self.ids[:, rows.columns : rows.columns + q_len] = SKIPPED
        ends, new = to_device(np.stack([rows.ends, counts]), device)[:, :, None]
        column = torch.arange(q_len, device=device)
        if ids is None:
            tokens = torch.full((len(counts), q_len), UNKNOWN, dtype=torch.int32, device=device)
        else:
            tokens = ids.to(device, torch.int32).gather(1, (column + q_len - new) % q_len)
        self.ids.scatter_(1, ends + column, tokens.masked_fill_(column >= new, SKIPPED))
        self.columns = rows.grown_by(counts).columns

    def cut(self, columns: int) -> None:
        """Forgets all columns from `columns` on."""
        self.columns, self.images_end = min(self.columns, columns), min(self.images_end, columns)
        if not columns:
            self.fault = self.fetched = self.deltas = None

    @in_normal_mode
    def take_back(self, before: np.ndarray, after: np.ndarray) -> Tensor | None:
        """Row i ends at column after[i] instead of before[i]. Returns [batch] int32, tokens it held there; None: no ids noted."""
        removed = None
        if self.ids is not None:
            start, end = int(np.where(after < before, after, before.max()).min()), int(before.max())
            tail = self.ids[:, start:end]
            gone = torch.arange(start, end, device=tail.device) >= to_device(after, tail.device)[:, None]
            removed = (gone & (tail != SKIPPED)).sum(1, dtype=torch.int32)
            tail.masked_fill_(gone, SKIPPED)
        self.cut(int(after.max()))
        return removed

    @in_normal_mode
    def select_rows(self, index: Tensor) -> None:
        if self.ids is not None:
            self.ids = self.ids.index_select(0, index.to(self.ids.device))
        if self.deltas is not None:
            self.deltas = self.deltas.index_select(0, index.to(self.deltas.device))

    def first_difference(
        self, ids: Tensor, mask: Tensor | None, images: bool = False, print_of: Callable[[Tensor], Tensor] | None = None
    ) -> int:
        """The first column in which `ids` [batch, n] has another token than is held, or none; waits for the device.

        Columns of `mask` [batch, n] that are 0, those that a row left out, and unknown tokens match anything. images: whether the
        call brings images. print_of(ids): fingerprints of the embeddings of these tokens, by which all are compared where some
        came as embeddings. Raises ValueError if the call brings images, or if a prompt with images is held and the call does not
        begin with all of that: ids do not tell which images they stand for.
        """
        n = min(ids.shape[1], self.columns)
        if images and self.columns:
            raise ValueError(
                f"the ZigzagCache holds {self.columns} tokens and the call brings images, which token ids do not tell apart: "
                "call reset() before, and give the whole conversation with all of its images"
            )
        same = self._first_difference(ids, mask, n, print_of)
        if same < self.images_end:
            raise ValueError(
                f"the ZigzagCache holds a prompt with images of {self.images_end} tokens, and the call begins with the first "
                f"{same} of them only: call reset() before another conversation, and give its images"
            )
        return same

    def _first_difference(self, ids: Tensor, mask: Tensor | None, n: int, print_of: Callable[[Tensor], Tensor] | None) -> int:
        if self.ids is None or not n:
            return n
        held = self.ids[:, :n]
        ids = ids[:, :n].to(held.device)
        if print_of is not None and bool(((held < UNKNOWN) | (ids < UNKNOWN)).any()):
            held, ids = (torch.where(t < 0, t.int(), print_of(t.clamp(min=0))) for t in (held, ids))
        differs = (held != ids) & (held != UNKNOWN) & (held != SKIPPED)
        if mask is not None:
            differs &= mask[:, :n].to(held.device) != 0
        columns = differs.any(0).nonzero()
        return int(columns[0]) if len(columns) else n

    @in_normal_mode
    def mask_fault(self, mask: Tensor, q_len: int, ahead: bool, takes_all: bool = False) -> Tensor:
        """0-d int64, not waited for: what is wrong with `mask` [batch, columns + q_len], or 0.

        ahead: whether rings hold tokens taken back. takes_all: whether layers take in what they are given, masked or not.
        """
        visible, seen = mask != 0, self.columns
        tail, faults = visible[:, seen:], []
        if seen:
            faults.append((visible[:, :seen] != (self.ids[:, :seen] != SKIPPED).to(mask.device)).any() * _CHANGED)
        if ahead:
            faults.append((~tail).any() * _SKIPPED_AHEAD)
        if takes_all:
            faults.append((~tail).any() * _SKIPPED_ALONE)
        return torch.stack(faults).max() if faults else mask.new_zeros((), dtype=torch.int64)

    @in_normal_mode
    def remember(self, fault: Tensor) -> None:
        """Keeps a fault for `raise_remembered`, and starts to copy it to the host."""
        self.fault = fault if self.fault is None else torch.maximum(self.fault, fault)
        if self.fetched is None:
            host = torch.empty((), dtype=torch.int64, pin_memory=True)
            host.copy_(self.fault, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.fetched = host, event

    def raise_remembered(self) -> None:
        """Raises ValueError if an earlier forward had a wrong mask and the host knows by now; never waits."""
        if self.fetched is not None and self.fetched[1].query():
            code, self.fetched = int(self.fetched[0]), None
            if code:
                self.fault = None
                raise ValueError(f"in an earlier step, whose output is wrong: {_ERRORS[code]}")


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Integers as a tensor on the device, without waiting for it."""
    host = torch.from_numpy(numbers.copy())
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def raise_mask_error(code: int) -> None:
    if code:
        raise ValueError(_ERRORS[code])
