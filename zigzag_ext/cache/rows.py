"""Rows: what the host knows of each row of a cache, so that nothing waits for the device."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from ..planning.plan import token_count
from ..planning.reading import shown


def token_counts(name: str, given: int | Sequence[int]) -> np.ndarray:
    """Integers of any shape as int64. Raises TypeError for what are none, bools included, ValueError beyond 64 bits."""
    try:
        array = np.asarray(given)
    except (TypeError, ValueError):  # rows of several lengths; a tensor on a GPU
        raise TypeError(f"{name} takes integer numbers of tokens on the host, got {shown(given)}") from None
    return np.array([token_count(name, each) for each in array.ravel().tolist()], dtype=np.int64).reshape(array.shape)


@dataclass(frozen=True)
class Rows:
    """Six numbers per row, [batch] int64 each. Rows end at different columns after each took back a number of its own.

    ends: columns up to the row's last one. held: tokens, an upper bound. solid: of the row's last columns, how many are known to
    be tokens, without one that it left out. ahead: columns behind its end that were written and taken back, which rings may
    still hold. prompt, sealed: tokens and columns of a prompt that was compressed, which layers may have dropped some of; 0
    without.

    `ahead` is of columns although rings hold tokens: where a row leaves columns out, what it had written ahead stays as far ahead
    as it was when a crop to that place was allowed. Further back every column counts.
    """

    ends: np.ndarray
    held: np.ndarray
    solid: np.ndarray
    ahead: np.ndarray
    prompt: np.ndarray
    sealed: np.ndarray

    @classmethod
    def empty(cls, batch: int | None) -> "Rows":
        zeros = np.zeros(batch or 0, dtype=np.int64)
        return cls(zeros, zeros, zeros, zeros, zeros, zeros)

    @cached_property
    def columns(self) -> int:
        return int(self.ends.max(initial=0))

    @cached_property
    def longest(self) -> int:
        return int(self.held.max(initial=0))

    @cached_property
    def furthest_ahead(self) -> int:
        return int(self.ahead.max(initial=0))

    @cached_property
    def shown(self) -> set[tuple[int, int]]:
        """Tokens held and written ahead, of rows that hold some."""
        return {pair for pair in zip(self.held.tolist(), self.ahead.tolist(), strict=True) if pair[0]}

    @cached_property
    def grown(self) -> int:
        """Tokens behind a compressed prompt, or all, of the row that has most of them; an upper bound."""
        return int((self.held - self.prompt).max(initial=0))

    def lack(self, left_out: np.ndarray) -> bool:
        """Whether a row ends within a prompt of which it has left out some tokens, left_out [batch]."""
        return bool(((self.ends < self.sealed) & (left_out > 0)).any())

    @cached_property
    def ragged(self) -> bool:
        """Whether rows end at different columns."""
        return bool((self.ends != self.columns).any())

    @cached_property
    def uniform(self) -> bool:
        """Whether every row is known to hold one token per column."""
        return bool((self.solid == self.columns).all())

    def followed_by(self, columns: int) -> "Rows":
        """Behind `columns` more, which begin for all rows where the longest one ends: tokens all of them."""
        gap, end = self.ends != self.columns, np.full_like(self.ends, self.columns + columns)
        solid = np.where(gap, 0, self.solid) + columns
        return Rows(end, self.held + columns, solid, self._overwritten(columns), self.prompt, self.sealed)

    def with_some_left_out(self, columns: int) -> "Rows":
        """As `followed_by`, where nobody knows which of the new columns a row has left out."""
        return replace(self.followed_by(columns), solid=np.zeros_like(self.solid))

    def with_padding(self, columns: int, padding: np.ndarray, held: np.ndarray, leads: bool = True) -> "Rows":
        """As `followed_by`, where `padding` of the new columns are left out, and rows then hold `held` tokens.

        leads: whether those are the first ones.
        """
        rows = self.followed_by(columns)
        solid = np.where(padding > 0, columns - padding if leads else 0, rows.solid)
        return replace(rows, held=held, solid=np.where(held == rows.ends, held, solid))

    def grown_by(self, tokens: np.ndarray) -> "Rows":
        """Behind `tokens` [batch] more, which follow each row's own last one."""
        ends, held, solid = self.ends + tokens, self.held + tokens, self.solid + tokens
        return Rows(ends, held, solid, self._overwritten(tokens), self.prompt, self.sealed)

    def cut_at(self, ends: np.ndarray) -> "Rows":
        """Without the columns of each row from `ends` [batch] on."""
        removed = self.ends - ends
        known = np.minimum(removed, self.solid)
        held = np.where(removed > known, np.minimum(self.held - known, ends), self.held - known)
        ahead = np.where(ends > 0, self.ahead + removed, 0)  # from nothing on all is written anew
        return Rows(ends, held, self.solid - known, ahead, self.prompt, self.sealed)

    def new_tokens(self, name: str, given: Sequence[int], most: int = 1 << 30) -> np.ndarray:
        """`given` [batch] of 0 to `most` as int64. Raises TypeError, ValueError."""
        tokens = token_counts(name, given)
        if tokens.shape != self.ends.shape or (tokens < 0).any() or (tokens > most).any():
            raise ValueError(f"{name} must be [{len(self.ends)}] numbers of 0 to {most} new tokens, got {shown(tokens.tolist())}")
        return tokens

    def cropped(self, tokens: int | Sequence[int]) -> "Rows":
        """Cut by `ZigzagCache.crop(tokens)`. Raises RuntimeError, ValueError as that does."""
        given = token_counts("crop()", tokens)
        if given.ndim and given.shape != self.ends.shape:
            raise ValueError(f"crop() takes one number or one per row of {len(self.ends)}, got {given.shape}")
        ends = self.ends if given.ndim else np.full_like(self.ends, self.columns)
        if (-given > (ends if given.ndim else self.columns)).any():
            raise RuntimeError(f"crop({tokens}) takes back more than the {self.columns} tokens that the cache holds")
        kept = np.where(given < 0, ends + given, np.where(given > 0, given, ends))
        return self.cut_at(np.minimum(kept, self.ends))

    def with_ahead(self, ahead: np.ndarray | int) -> "Rows":
        """After at least `ahead` tokens were written behind the end of each row."""
        return replace(self, ahead=np.maximum(self.ahead, ahead))

    def without(self, row: int) -> "Rows":
        """Where `row` is empty, and everything about it forgotten."""
        others = np.arange(len(self.ends)) != row
        return Rows(*(getattr(self, field.name) * others for field in fields(self)))

    def compressed(self, held: np.ndarray) -> "Rows":
        """After the prompt was compressed, where rows hold `held` tokens."""
        return replace(self, held=held, prompt=held, sealed=self.ends)

    def select(self, index: np.ndarray | None, batch: int) -> "Rows":
        """Row i becomes what row index[i] was; None: `batch` rows, nobody knows which, of rows that all end together."""
        if index is not None:
            return Rows(*(getattr(self, field.name)[index] for field in fields(self)))
        bounds = (self.columns, self.longest, self.solid.min(initial=self.columns), self.furthest_ahead)
        bounds = (*bounds, self.prompt.max(initial=0), self.sealed.max(initial=0))
        return Rows(*(np.full(batch, bound, dtype=np.int64) for bound in bounds))

    def _overwritten(self, columns: np.ndarray | int) -> np.ndarray:
        return np.maximum(self.ahead - columns, 0)
