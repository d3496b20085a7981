"""`solve`: from a matrix of head scores to a plan. Needs neither a model nor weights nor a GPU."""

from numbers import Real

import numpy as np
from numpy.typing import ArrayLike

from . import _C
from .plan import Plan


def objectives() -> dict[str, str]:
    """Every objective that `solve` knows: its name and what it does, in one line."""
    return _C.objectives()


def solve(scores: ArrayLike, retrieval_ratio: float = 0.5, objective: str = "mean", *, sink: int = 64, window: int = 256) -> Plan:
    """Makes the best layers under `objective` retrieval layers and lets the others stream. Exact and deterministic.

    Args:
        scores: [layers, kv_heads] in [0, 1], how much each KV head needs the whole context (`load_scores` reads them).
        retrieval_ratio: share of retrieval layers, in [0, 1]. Exactly retrieval_ratio * layers of them are chosen, rounded to
            the nearest integer, halves up. Among layers that serve equally well the lower index is chosen.
        objective: one of `objectives()`. "mean" keeps the layers with the largest mean score; "even" spaces them evenly.
        sink, window: tokens that streaming layers keep, see `Plan`.

    Returns:
        A plan whose provenance records the objective, the ratio, `objective_value`, `retained_score` (share of the summed
        scores that lies in retrieval layers) and `layer_values` (how the objective rates each layer).

    Raises:
        ValueError: scores are empty, not a matrix, NaN or outside [0, 1], the ratio is, or the objective is unknown.
        TypeError: scores, ratio, sink or window are not numbers.

    Source: the split into retrieval and streaming heads by score is DuoAttention's (https://arxiv.org/abs/2410.10819), whole
    layers of one kind are ZigzagAttention's (https://arxiv.org/abs/2508.12407). The criteria are this package's own.

    Example:
        >>> solve([[0.9, 0.8], [0.1, 0.3], [0.2, 0.7]], retrieval_ratio=1 / 3).retrieval_layers
        (0,)
    """
    if not isinstance(retrieval_ratio, Real):
        raise TypeError(f"retrieval_ratio must be a number in [0, 1], got {retrieval_ratio!r}")
    solution = _C.solve(_matrix(scores), retrieval_ratio, objective)
    provenance = {
        "objective": objective,
        "retrieval_ratio": float(retrieval_ratio),
        "objective_value": solution.objective_value,
        "retained_score": solution.retained_score,
        "layer_values": solution.layer_values,
    }
    return Plan(solution.kinds, sink=sink, window=window, provenance=provenance)


def _matrix(scores: ArrayLike) -> np.ndarray:
    try:
        matrix = np.asarray(scores)
    except ValueError as error:
        raise ValueError(f"scores must be a [layers, kv_heads] matrix: {error}") from error
    if matrix.dtype.kind not in "fiub":
        raise TypeError(f"scores must be real numbers, got an array of {matrix.dtype}")
    return matrix.astype(np.float64)
