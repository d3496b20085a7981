"""Pool: rows and bytes that requests reserve before they run, so that one that runs never lacks memory.

A row that nobody has reserved may be *kept*: what it holds may be of use, and goes when the row or its bytes are needed.
Arithmetic only. What a row takes comes as a function of its tokens, see `Slots.row_memory`.
"""

import bisect
import functools
import heapq
from collections.abc import Callable

from .errors import RequestTooLarge


class Pool:
    """Rows 0 to `rows` - 1 and `budget` bytes for all of them.

    row_memory(tokens): bytes of the pages that a row of so many tokens takes, growing with the tokens. max_len: most tokens of a
    row.

    Raises:
        ValueError: not even a row of one token fits.
    """

    def __init__(self, budget: int, rows: int, max_len: int, row_memory: Callable[[int], int]):
        self.budget, self.rows, self.max_len = budget, rows, max_len
        self.row_memory = functools.lru_cache(maxsize=4096)(row_memory)
        self.reserved: dict[int, int] = {}  # bytes by row
        self.kept: set[int] = set()
        self._empty = list(range(rows))
        self.most = bisect.bisect_right(range(1, max_len + 1), budget, key=row_memory)  # tokens of the largest row that fits
        if not self.most:
            raise ValueError(f"{max(0, budget):,} bytes are left for keys and values, a row of one token takes {row_memory(1):,}")

    @property
    def free_rows(self) -> int:
        """Rows that nobody has reserved."""
        return self.rows - len(self.reserved)

    @property
    def empty_rows(self) -> int:
        """Those of them that are not kept."""
        return len(self._empty)

    @property
    def reserved_bytes(self) -> int:
        return sum(self.reserved.values())

    def check(self, prompt: int, max_tokens: int) -> None:
        """Raises RequestTooLarge if prompt + max_tokens tokens never fit."""
        if prompt + max_tokens > self.most:
            limit = (
                f"max_len={self.max_len}"
                if self.most == self.max_len
                else f"the {self.budget:,} bytes for keys and values, which {self.most} tokens fill"
            )
            raise RequestTooLarge(
                f"a prompt of {prompt} tokens and max_tokens={max_tokens} are {prompt + max_tokens} together, more than {limit}: "
                f"give at most {self.most} in all",
                self.most,
            )

    def capacity(self, tokens: int) -> int:
        """Requests of so many tokens, prompt and max_tokens together, that can run at once."""
        if tokens > self.most:
            return 0
        size = self.row_memory(tokens)
        return min(self.rows, self.budget // size) if size else self.rows

    def fits(self, tokens: int) -> bool:
        """Whether a row of so many tokens could be taken now."""
        return self.free_rows > 0 and self.reserved_bytes + self.row_memory(tokens) <= self.budget

    def take(self, tokens: int, row: int | None = None) -> int:
        """Reserves a row of so many tokens, which fits. Returns its number: a kept `row`, or the lowest that is empty."""
        if not self.fits(tokens):
            raise RuntimeError(f"no row of {tokens} tokens fits beside {len(self.reserved)} others")
        if row is None:
            row = heapq.heappop(self._empty)
        else:
            self.kept.remove(row)
        self.reserved[row] = self.row_memory(tokens)
        return row

    def give_back(self, row: int, keep: bool = False) -> None:
        del self.reserved[row]  # raises KeyError for one that is not taken
        self.kept.add(row)
        if not keep:
            self.empty(row)

    def empty(self, row: int) -> None:
        """A kept row holds nothing any more."""
        self.kept.remove(row)
        heapq.heappush(self._empty, row)
