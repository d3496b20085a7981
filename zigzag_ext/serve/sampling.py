"""Sampling: what a request asks for, and the choice of tokens, which no other request has a part in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..planning.plan import token_count

_BITS = 48  # of a uniform number: few enough that number * total < total in float64


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen, and when it ends.

    Args:
        max_tokens: most new tokens.
        temperature: divides the logits. 0: the token of the largest logit.
        top_k: samples from that many tokens of the largest logits. None: from all.
        top_p: samples from the fewest tokens of the largest logits whose probabilities add up to top_p; behind top_k.
        seed: 0 to 2^64 - 1. The same seed gives the same tokens whatever runs beside the request, but where two are within
            rounding of each other. None: one at random.
        stop: a string or several: ends with the token that completes one. The text ends before it. Needs a tokenizer.
        ignore_eos: goes on behind the tokens that end generate().

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.
    """

    max_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False

    def __post_init__(self):
        if token_count("max_tokens", self.max_tokens) < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.top_k is not None and token_count("top_k", self.top_k) < 1:
            raise ValueError(f"top_k must be at least 1 token or None, got {self.top_k}")
        _number("temperature", self.temperature)
        if not 0 < _number("top_p", self.top_p) <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int | np.integer)):
            raise TypeError(f"seed must be an integer or None, got {self.seed!r}")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed must be 0 to 2^64 - 1 or None, got {self.seed}")
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise TypeError(f"stop must be a string or several, none of them empty; got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(stop))


class Draw(NamedTuple):
    """The choice of one token: `position` of it in the row, `seed` of the request."""

    sampling: Sampling
    seed: int
    position: int

    @property
    def uniform(self) -> float:
        """A number in [0, 1) that depends on nothing else: Philox (https://doi.org/10.1145/2063384.2063405)."""
        return (int(np.random.Philox(key=int(self.seed), counter=self.position).random_raw()) >> 64 - _BITS) / (1 << _BITS)

    @property
    def filters(self) -> bool:
        return self.sampling.top_k is not None or self.sampling.top_p < 1


def choose(logits: Tensor, draws: Sequence[Draw]) -> list[int | None]:
    """A token for each row of logits [n, vocab], on any device, which is waited for once; None where they are not finite."""
    best, tokens = logits.max(-1)  # NaN, if there is any, is the largest
    for filters in (False, True):
        rows = [i for i, draw in enumerate(draws) if draw.sampling.temperature > 0 and draw.filters is filters]
        if rows:
            index = torch.tensor(rows, device=logits.device)
            tokens[index] = _sampled(logits[index], [draws[i] for i in rows], filters)
    host = torch.stack([tokens, best.isfinite().long()]).tolist()
    return [token if finite else None for token, finite in zip(*host, strict=True)]


def _sampled(logits: Tensor, draws: Sequence[Draw], filters: bool) -> Tensor:
    """[n] int64: where the cumulative sum of each row's probabilities passes its uniform number, by float64.

    With filters in the order of falling logits, of equal ones the lower token first; else in the order of the tokens.
    """

    def column(numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None]

    scores = logits.double()
    scores = (scores - scores.amax(-1, keepdim=True)) / column([draw.sampling.temperature for draw in draws])  # finite, or -inf
    order = None
    if filters:
        scores, order = scores.sort(dim=-1, descending=True, stable=True)
        rank = torch.arange(scores.shape[1], device=scores.device)
        scores = scores.masked_fill(rank >= column([draw.sampling.top_k or scores.shape[1] for draw in draws]), -math.inf)
    probs = scores.softmax(-1)
    if filters:
        before = probs.cumsum(-1) - probs
        probs = probs.masked_fill((before >= column([draw.sampling.top_p for draw in draws])) & (rank > 0), 0.0)
    edges = probs.cumsum(-1)
    number = column([draw.uniform for draw in draws]) * edges[:, -1:]
    index = torch.searchsorted(edges, number, right=True).clamp(max=edges.shape[1] - 1)  # beyond: where they are not finite
    return (index if order is None else order.gather(1, index))[:, 0]


def _number(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return float(value)
