"""From blocks of tokens to what the op takes: rings, and requests that are served by one call. No vLLM is needed here.

Of each request the keys and values of the sink and of the window before the new tokens are gathered from their blocks into a
ring of sink + window slots, at most that many tokens whatever the context is. Between the two there is no gap in the ring, so
positions behind the sink are lower by what was left out. That changes no mask: it depends on differences of such positions, and
on whether a position is below `sink`.
"""

from itertools import groupby

import torch


def ring_positions(past: torch.Tensor, sink: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of requests that hold `past` [rows] tokens, what a ring gets for the next ones.

    Returns:
        positions: [rows, sink + window] int64, of the sink and then of the last window - 1 tokens; 0 where a slot gets none.
        held: [rows] int32, slots that got one; they are the first ones.
    """
    start = (past - window + 1).clamp(min=sink)  # of the window, never within the sink
    slot = torch.arange(sink + window, device=past.device)
    positions = torch.where(slot < sink, slot, start[:, None] + slot - sink)
    held = past.clamp(max=sink) + (past - start).clamp(min=0)
    return torch.where(positions < past[:, None], positions, 0), held.int()


def runs(starts: list[int]) -> list[tuple[slice, slice, int]]:
    """Requests that stand side by side and have equally many new tokens.

    Args:
        starts: where the new tokens of each request start in the batch, and, last, where they all end.

    Returns:
        For each run its requests, its tokens, and the new tokens of one of them. Requests without any are left out.
    """
    found, first = [], 0
    for length, run in groupby(end - start for start, end in zip(starts, starts[1:], strict=False)):
        last = first + sum(1 for _ in run)
        if length:
            found.append((slice(first, last), slice(starts[first], starts[last]), length))
        first = last
    return found
