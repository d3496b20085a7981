"""Fingerprints: what stands in the place of an id for a token that came as an embedding."""

import functools

import torch
from torch import Tensor

from ..attention.store import in_normal_mode
from .tokens import UNKNOWN

_BITS = 30
_AT_ONCE = 1 << 22  # elements that are widened at a time, to 8 bytes each


@in_normal_mode
def fingerprints(embeddings: Tensor) -> Tensor:
    """[batch, n] int32 below `UNKNOWN` for embeddings [batch, n, size]: equal for equal bits, hardly ever (2^-30) for others.

    The sum of all 16-bit parts, each times a random number of its own, modulo 2^64, of which the highest bits count: the same on
    every device and in every order of summation. Waits for nothing.
    """
    parts = embeddings.detach().contiguous().view(torch.int16).flatten(0, 1)
    factors = _factors(parts.shape[1], parts.device)
    found = [(block * factors).sum(1) for block in parts.split(max(1, _AT_ONCE // parts.shape[1]))]
    return (UNKNOWN - 1 - (torch.cat(found) >> 64 - _BITS & (1 << _BITS) - 1)).int().view(embeddings.shape[:2])


@functools.lru_cache(maxsize=8)
def _factors(count: int, device: torch.device) -> Tensor:
    limits = torch.iinfo(torch.int64)
    drawn = torch.randint(limits.min, limits.max, (count,), generator=torch.Generator().manual_seed(0))
    return drawn.to(device)
