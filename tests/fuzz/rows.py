"""What a cache should hold, as plain lists of tokens."""

from dataclasses import dataclass

import torch

SKIP = -1  # a column that the row left out


@dataclass(frozen=True)
class Rows:
    """Tokens of every column of every row; no rows: an empty cache. early: columns by which rows end before the longest one."""

    rows: tuple[tuple[int, ...], ...] = ()
    early: tuple[int, ...] = ()

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> int:
        return len(self.rows[0]) if self.rows else 0

    @property
    def tokens(self) -> list[list[int]]:
        """Without the columns that were left out."""
        return [[token for token in row if token != SKIP] for row in self.rows]

    @property
    def ids(self) -> torch.Tensor:
        """[batch, columns], 0 where a row left the column out."""
        return torch.tensor(self.rows).clamp(min=0)

    @property
    def mask(self) -> torch.Tensor:
        """[batch, columns], 1 for tokens."""
        return (torch.tensor(self.rows) != SKIP).long()

    def added(self, new: "Rows") -> "Rows":
        return Rows(tuple(a + b for a, b in zip(self.rows, new.rows, strict=True))) if self.columns else new

    @property
    def ends(self) -> list[int]:
        """Columns up to each row's last one."""
        return [self.columns - n for n in self.early or (0,) * self.batch]

    def cut(self, columns: int) -> "Rows":
        return self.cut_rows([min(end, columns) for end in self.ends])

    def cut_rows(self, ends: list[int]) -> "Rows":
        """Row i ends at column ends[i]; what only longer rows have, it has left out."""
        width = max(ends, default=0)
        rows = (row[: max(end, 0)] + (SKIP,) * (width - max(end, 0)) for row, end in zip(self.rows, ends, strict=True))
        return Rows(tuple(rows), tuple(width - max(end, 0) for end in ends)) if width > 0 else Rows()

    def chosen(self, index: list[int]) -> "Rows":
        ends = self.ends
        return Rows(tuple(self.rows[i] for i in index)).cut_rows([ends[i] for i in index]) if self.columns else self

    def left_padded(self) -> "Rows":
        """The same tokens as one prompt."""
        width = max(map(len, self.tokens))
        return Rows(tuple((SKIP,) * (width - len(row)) + tuple(row) for row in self.tokens))


def new_rows(batch: int, q_len: int, seed: int, skipped: list[int] | None = None) -> Rows:
    """Random tokens of which row i leaves the first skipped[i] out."""
    drawn = torch.randint(3, 199, (batch, q_len), generator=torch.Generator().manual_seed(seed)).tolist()
    left_out = [0] * batch if skipped is None else [min(skipped[i], q_len) for i in range(batch)]
    return Rows(tuple((SKIP,) * n + tuple(row[n:]) for n, row in zip(left_out, drawn, strict=True)))


def arguments(held: Rows, new: Rows, plain: bool) -> dict[str, torch.Tensor]:
    """What a model is given for `new` behind `held`; plain: without mask and positions, which the rows then must not need."""
    if plain:
        return {"input_ids": new.ids}
    mask = held.added(new).mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, held.columns :]
    return {"input_ids": new.ids, "attention_mask": mask, "position_ids": positions}
