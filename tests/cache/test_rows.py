"""Rows: bounds on the host hold for every history of forwards, skipped columns and crops."""

import numpy as np
import pytest

from zigzag_ext.cache.rows import Rows


class History:
    """What rows really hold: a list of columns each, True for a token; and how far ahead columns were written."""

    def __init__(self, batch):
        self.columns, self.ahead = [[] for _ in range(batch)], [0] * batch

    def follow(self, left_out, columns):
        width = max(map(len, self.columns))
        for row, n in enumerate(left_out):
            self.columns[row] += [False] * (width - len(self.columns[row])) + [False] * n + [True] * (columns - n)
            self.ahead[row] = max(0, self.ahead[row] - columns)

    def cut(self, ends):
        for row, end in enumerate(ends):
            self.ahead[row] = self.ahead[row] + len(self.columns[row]) - end if end else 0
            del self.columns[row][end:]


@pytest.mark.parametrize("seed", range(40))
def test_bounds_hold(seed):
    rng, batch = np.random.default_rng(seed), 3
    real, rows = History(batch), Rows.empty(batch)
    for _ in range(60):
        columns = int(rng.integers(1, 9))
        left_out = rng.integers(0, columns + 1, batch) * rng.integers(0, 2, batch)
        action = rng.choice(["follow", "short mask", "prompt", "counts", "crop", "crop rows"])
        if action == "follow":
            real.follow([0] * batch, columns)
            rows = rows.followed_by(columns)
        elif action == "short mask":
            real.follow(left_out, columns)
            rows = rows.with_some_left_out(columns)
        elif action == "prompt":
            real.follow(left_out, columns)
            rows = rows.with_padding(columns, left_out, np.array([sum(row) for row in real.columns]))
        elif action == "counts":
            for row, n in enumerate(left_out):
                real.columns[row] += [True] * int(n)
                real.ahead[row] = max(0, real.ahead[row] - int(n))
            rows = rows.grown_by(left_out)
        else:
            each = rows.ends - np.minimum(left_out, rows.ends)
            ends = each if action == "crop rows" else np.minimum(rows.ends, max(0, rows.columns - columns))
            real.cut(ends)
            rows = rows.cut_at(ends)
        assert rows.ends.tolist() == [len(row) for row in real.columns] and rows.columns == max(map(len, real.columns))
        assert all(bound >= sum(row) for bound, row in zip(rows.held, real.columns, strict=True))
        assert all(all(row[len(row) - n :]) for n, row in zip(rows.solid, real.columns, strict=True))
        assert rows.ahead.tolist() == real.ahead
        if rows.uniform:
            assert all(all(row) and len(row) == rows.columns for row in real.columns)


def test_a_crop_into_padding_of_a_later_turn_keeps_the_longest_row():
    """Row 0 holds ten tokens, then three columns of padding and two tokens: five columns less are two tokens less."""
    rows = Rows.empty(2).with_padding(10, np.array([0, 5]), np.array([10, 5]))
    rows = rows.with_padding(5, np.array([3, 0]), np.array([12, 10]))
    assert rows.cut_at(np.array([10, 10])).held.tolist() == [10, 5]


def test_rows_of_a_prompt_without_padding_are_uniform():
    rows = Rows.empty(2).with_padding(10, np.array([0, 5]), np.array([10, 5]))
    assert not rows.uniform and rows.cut_at(np.array([8, 8])).held.tolist() == [8, 3]
    assert Rows.empty(2).followed_by(4).with_padding(5, np.zeros(2, int), np.array([9, 9])).uniform


def test_unknown_rows():
    rows = Rows.empty(2).with_padding(10, np.array([0, 5]), np.array([10, 5])).select(None, 3)
    assert (rows.ends.tolist(), rows.held.tolist(), rows.solid.tolist()) == ([10] * 3, [10] * 3, [5] * 3)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("slack,slots", [(0, 12), (3, 12), (8, 20), (5, 200)])
def test_rings_lack_nothing_that_rows_show(seed, slack, slots):
    """A ring, told by the last token that each slot got, under every crop that `ahead` allows."""
    rng, window = np.random.default_rng(seed), slots - slack
    tokens, ring, rows = [], {}, Rows.empty(1)  # tokens: of every column its number, None if left out

    def shown(columns):
        held = sum(token is not None for token in columns)
        return range(max(0, held - window), held)

    for _ in range(150):
        columns = int(rng.integers(1, 7))
        if rng.random() < 0.7:
            left_out = int(rng.integers(0, columns + 1) * rng.integers(0, 2))
            for new in [False] * left_out + [True] * (columns - left_out):
                number = sum(token is not None for token in tokens)
                tokens.append(number if new else None)
                if new:
                    ring[number % slots] = number
            held = np.array([sum(token is not None for token in tokens)])
            known = rng.random() < 0.5
            rows = rows.with_padding(columns, np.array([left_out]), held) if known else rows.with_some_left_out(columns)
        else:
            cut = rows.cut_at(np.maximum(rows.ends - columns, 0))
            if all(ahead <= slack or length + ahead <= slots for length, ahead in cut.shown):
                rows = cut
                del tokens[int(cut.ends[0]) :]
        for number in shown(tokens):
            assert ring[number % slots] == number
