"""Prefixes: rows stay when their requests have ended, and a prompt that begins as a row does goes on from there.

Keys and values of a token depend on the tokens before it and on nothing behind it: those of a retrieval layer serve any beginning
of their row. Rings hold the last tokens only. They serve the end of what a row holds, and places where copies of them were made,
which are called marks here.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..cache.slots import Slots
from ..hf.compiled import fingerprint
from ..hf.ranks import local_tensors
from .pool import Pool
from .scheduler import Job

MARK_EVERY = 8192  # tokens, beside a mark at the end of each prompt
BRANCH = 128  # tokens more than there is a mark for, in which two prompts begin alike, are worth a mark: a third may come
TAIL = 20  # a row is taken over at once for so many times what is lost of it: copying a token costs little, but not nothing
LEAST = 16  # tokens that are worth a copy: a chunk of a prompt reads as many on the side


@dataclass
class Held:
    """What a row is known to hold. ids: int32, its prompt; of a row that has ended, all of its tokens.

    model: number of what its keys come from, see `Prefixes.model_number`. gives: whether prompts may go on from it. marks: copies
    of its rings, by the number of tokens behind which they were made. branch: tokens of the prompt with which another one begins,
    behind which a mark is to be made; 0: none.
    """

    ids: np.ndarray
    salt: str | None
    model: int
    gives: bool
    ended: bool = False
    marks: dict[int, list[Tensor]] = field(default_factory=dict)
    branch: int = 0


class Hit(NamedTuple):
    """The first `tokens` tokens of `row`. rings: which go with them, as of `ringed` tokens; None: those that the row has now."""

    row: int
    tokens: int
    ringed: int
    rings: list[Tensor] | None


class Prefixes:
    """What the rows of `slots` hold that prompts may begin with.

    Rows that have ended and marks take those of the pool's bytes that nobody has reserved. The least recently used go when a
    request needs them.

    model_is: tells what keys come from, see `model_state`. smoothed: tokens of a prompt whose mean is taken off smoothed keys;
    that of a shorter prompt is another one, so it neither gives nor takes beginnings. is_on: False: rows go with their requests.
    """

    def __init__(self, slots: Slots, pool: Pool, model_is: Callable[[], Hashable], smoothed: int = 0, is_on: bool = True):
        self.slots, self.pool, self.model_is, self.smoothed, self.is_on = slots, pool, model_is, smoothed, is_on
        self.least = LEAST
        self.rows: dict[int, Held] = {}  # the least recently used first
        self.bytes = 0  # of rows that have ended, and of marks
        self._model, self._number = None, 0

    def pick(self, job: Job) -> tuple[int | None, int]:
        """The kept row that a job takes when it is admitted, None for an empty one, and the tokens that it is then for.

        A row that the prompt begins as is taken over, and what it holds behind that lost, where that is little, or where a copy
        would push out more.
        """
        (hit, _), size = self._find(job), self.pool.row_memory(job.size)
        ended = [row for row, held in self.rows.items() if held.ended]
        if hit is not None and hit.row in ended:
            lost, others = self.slots.held[hit.row] - hit.tokens, [row for row in ended if row != hit.row]
            is_free = self.pool.empty_rows > 0 and self._has_room(size)
            beside = self.pool.reserved_bytes + self._bytes_of(hit.row) + size <= self.pool.budget
            if lost <= max(1, hit.tokens // TAIL) or not (is_free or (beside and others and self.slots.held[others[0]] < lost)):
                return hit.row, max(job.size, int(self.slots.committed[hit.row]))
            ended = others
        return None if self.pool.empty_rows else ended[0], job.size

    def begin(self, job: Job) -> int:
        """Prepares the row that `pick` gave to a job. Returns tokens of the prompt that it has taken over."""
        row, (hit, common), former = job.row, self._find(job), self.rows.pop(job.row, None)
        takes_over = hit is not None and hit.row == row
        if hit is not None and not takes_over:
            self._touch(hit.row)
        if takes_over:
            self.slots.extend(row, job.room)
        else:
            if former is not None:
                self.slots.release(row)
            self.slots.take(row, job.room)
        marks = {tokens: rings for tokens, rings in former.marks.items() if tokens <= hit.tokens} if takes_over else {}
        if self.is_on:
            gives, branch = job.prompt >= self.smoothed, common if common - (hit.tokens if hit else 0) >= BRANCH else 0
            self.rows[row] = Held(job.request.ids, job.request.salt, self.model_number(), gives, marks=marks, branch=branch)
        self._recount()
        self._make_room()
        if not takes_over:
            return 0
        if hit.rings is None and hit.tokens == self.slots.held[row]:
            self.mark(job)
        self.slots.resume(row, *hit)
        return hit.tokens

    def resume(self, job: Job) -> int:
        """Copies the longest beginning of a job's prompt that another row has. Returns tokens that need not be read any more."""
        hit, _ = self._find(job)
        if hit is None:
            return 0
        self._touch(hit.row)
        self.slots.resume(job.row, *hit)
        return hit.tokens - job.read

    def next_mark(self, job: Job) -> int:
        """Tokens of a job's prompt behind which the next mark is to be made, if the prompt is that long."""
        held, regular = self.rows.get(job.row), job.read - job.read % MARK_EVERY + MARK_EVERY
        if held is None or not self.slots.ring_row_bytes:
            return job.prompt
        return min(held.branch, regular) if held.branch > job.read else regular

    def mark(self, job: Job) -> None:
        """Copies the rings of a job's row, for prompts that go on from here; unless there is no memory for it."""
        held, tokens, size = self.rows.get(job.row), int(self.slots.held[job.row]), self.slots.ring_row_bytes
        if held is None or not (held.gives and size) or tokens < self.least or tokens in held.marks:
            return
        if self.slots.ringed[job.row] != tokens or not self._make_room(size):
            return
        try:
            held.marks[tokens] = self.slots.rings_of(job.row)
        except (MemoryError, torch.OutOfMemoryError):
            return
        self._recount()

    def keep(self, job: Job) -> bool:
        """Whether the row of a job that ends stays, from now on with all of its tokens."""
        held, tokens = self.rows.get(job.row), int(self.slots.held[job.row])
        if held is None or not held.gives or tokens < self.least:
            return False
        new = np.asarray(job.request.tokens, dtype=np.int32)
        held.ids, held.ended = np.concatenate([held.ids, new])[:tokens], True
        self._touch(job.row)
        self._recount()
        return True

    def drop(self, row: int) -> None:
        """Row `row` is about to be emptied."""
        self.rows.pop(row, None)
        self._recount()

    def clear(self) -> None:
        """Empties all rows that have ended."""
        for row in [row for row, held in self.rows.items() if held.ended]:
            self._evict(row)

    def forget(self) -> None:
        """Lets go of all that is known and copied, before the slots go."""
        self.rows, self.bytes = {}, 0

    def model_number(self) -> int:
        """Another one after each change of what keys come from."""
        now = self.model_is()
        if now != self._model:
            self._model, self._number = now, self._number + 1
        return self._number

    def check(self) -> None:
        """Raises RuntimeError unless rows, pool and bytes agree."""
        ended = {row: len(held.ids) for row, held in self.rows.items() if held.ended}
        if ended.keys() != self.pool.kept or any(self.slots.held[row] != tokens for row, tokens in ended.items()):
            raise RuntimeError(f"rows of {ended} tokens have ended, the pool has kept {self.pool.kept}")
        if self.bytes != sum(map(self._bytes_of, self.rows)) or not self._has_room(0):
            raise RuntimeError(f"{self.bytes} bytes are held beside {self.pool.reserved_bytes} of {self.pool.budget}")

    def _find(self, job: Job) -> tuple[Hit | None, int]:
        """The longest beginning of a job's prompt that a row can give, if it spares the job `least` tokens or more.

        And the tokens of the longest one that a row has, which rings may not reach. One token of the prompt is left to be read at
        least: logits come from there.
        """
        ids, salt, best, longest = job.request.ids, job.request.salt, None, 0
        most = job.read + self.least - 1
        for row, held in self.rows.items() if self.is_on and job.prompt >= self.smoothed else ():
            if held.ids is ids or not held.gives or held.salt != salt or held.model != self._number:
                continue
            common = _common(held.ids, ids[:-1])
            longest = max(longest, common)
            for ringed, rings in [(int(self.slots.ringed[row]), None), *held.marks.items()] if common > most else ():
                if (length := self.slots.reach(ringed, min(common, int(self.slots.held[row])))) > most:
                    best, most = Hit(row, length, ringed, rings), length
        if best is not None and self.rows[best.row].model != self.model_number():
            return None, 0
        return best, longest

    def _touch(self, row: int) -> None:
        self.rows[row] = self.rows.pop(row)

    def _bytes_of(self, row: int) -> int:
        held = self.rows[row]
        pages = self.slots.row_memory(int(self.slots.committed[row])) if held.ended else 0
        return pages + len(held.marks) * self.slots.ring_row_bytes

    def _recount(self) -> None:
        self.bytes = sum(map(self._bytes_of, self.rows))

    def _has_room(self, size: int) -> bool:
        return self.pool.reserved_bytes + self.bytes + size <= self.pool.budget

    def _make_room(self, size: int = 0) -> bool:
        """Lets go of what is used least until `size` bytes are free, of marks of rows that run only for what is reserved."""
        for row in [row for row, held in self.rows.items() if held.ended]:
            if not self._has_room(size):
                self._evict(row)
        for held in self.rows.values() if not size else ():
            if not self._has_room(0):
                held.marks.clear()
                self._recount()
        return self._has_room(size)

    def _evict(self, row: int) -> None:
        self.slots.release(row)
        self.drop(row)
        self.pool.empty(row)


def model_state(model: nn.Module) -> Hashable:
    """Changes with weights, modules and what is set in them. torch does not count what is written through `.data`."""
    tensors = (t for pair in local_tensors(model) for t in pair)
    versions = tuple(0 if t.is_inference() else t._version for t in tensors)
    return fingerprint(model), versions


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens with which both begin."""
    for most in (LEAST, max(len(a), len(b))):  # most differ early
        length = min(most, len(a), len(b))
        differs = a[:length] != b[:length]
        if differs.any():
            return int(differs.argmax())
    return length
