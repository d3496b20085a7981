"""When the tokens of requests came, and what that says."""

import time
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Times:
    """Of one request, in seconds of time.perf_counter(): when it was sent, and when each of its tokens came."""

    sent: float = field(default_factory=time.perf_counter)
    tokens: list[float] = field(default_factory=list)

    def note(self, token=None) -> None:
        self.tokens.append(time.perf_counter())


def all_decode(requests: list[Times]) -> tuple[float, float]:
    """From the first token of the last request to the last token of the first one."""
    return max(each.tokens[0] for each in requests), min(each.tokens[-1] for each in requests)


def summary(requests: list[Times], between: tuple[float, float] | None = None) -> dict[str, float]:
    """Fields of a ServeRecord. between: a span of time; tokens outside it do not count, nor does then the wait for first ones."""
    start, end = between or (min(each.sent for each in requests), max(each.tokens[-1] for each in requests))
    came = [np.array([at for at in each.tokens if start <= at <= end]) for each in requests]
    gaps = np.concatenate([np.diff(each) for each in came]) * 1e3
    firsts = np.array([] if between else [each.tokens[0] - each.sent for each in requests])
    count, wall = sum(map(len, came)), max(end - start, 1e-9)
    found = {"new_tokens": count, "wall_s": wall, "tokens_per_s": count / wall}
    for name, values in (("first_p{}_s", firsts), ("between_p{}_ms", gaps)):
        found |= {name.format(p): float(np.percentile(values, p)) if len(values) else 0.0 for p in (50, 99)}
    return found
