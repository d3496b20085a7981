"""`solve(level="head")`: every KV head for itself, by score alone, as DuoAttention deploys its gates."""

import math
from dataclasses import replace

import numpy as np

from .. import _C
from .plan import Plan


def solve_heads(
    scores: np.ndarray,
    budget: dict,
    bytes_of: tuple[list[int], list[int]],
    provenance: dict,
    shape: dict,
) -> Plan:
    """The plan whose retrieval heads are the best ones of `scores` [layers, kv_heads] in [0, 1].

    Args:
        budget: {name: value}, one of retrieval_ratio, kv_bytes, threshold, sparsity.
        bytes_of: KV bytes of every layer as a whole, as retrieval and as streaming layer.
        provenance: what to record beside the result. shape: the plan's other arguments: sink, window and formats.

    Source: https://github.com/mit-han-lab/duo-attention (duo_attn/utils.py, sparsify_attention_heads). It breaks ties by random
    noise below 1e-6; here the lower layer wins, then the lower head.
    """
    if scores.ndim != 2 or not scores.size or not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"scores must be a [layers, kv_heads] matrix of numbers in [0, 1], got shape {scores.shape}")
    [(name, value)] = budget.items()
    order = np.argsort(-scores.ravel(), kind="stable")
    head_bytes = [np.repeat(np.array(kind) // scores.shape[1], scores.shape[1]) for kind in bytes_of]
    retrieval = np.zeros(scores.size, dtype=bool)
    retrieval[order[: _count(name, value, scores, (head_bytes[0] - head_bytes[1])[order], int(head_bytes[1].sum()))]] = True
    kept = float(scores.ravel()[retrieval].sum())
    recorded = {
        "level": "head",
        "budget": budget,
        "retrieval_heads": int(retrieval.sum()),
        "objective_value": kept / scores.size,
        "retained_score": kept / total if (total := float(scores.sum())) else 1.0,
        "kv_bytes": int(np.where(retrieval, *head_bytes).sum()),
        **provenance,
    }
    return replace(
        Plan.from_heads(retrieval.reshape(scores.shape), sink=shape["sink"], window=shape["window"]), **shape, provenance=recorded
    )


def _count(name: str, value: float, scores: np.ndarray, more: np.ndarray, least: int) -> int:
    """How many heads retrieve. `more`: bytes that each adds, best head first, to `least` bytes when all stream."""
    if name in ("threshold", "sparsity") and not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    if name == "retrieval_ratio":
        return _C.count_retrieval_layers(value, scores.size)
    if name == "threshold":
        return int((scores >= value).sum())
    if name == "sparsity":  # what lies at or above the interpolated quantile, which is below a share of s (n - 1) of the others
        return 0 if value >= 1 else scores.size - math.ceil(value * (scores.size - 1))
    if least > value:
        raise ValueError(f"kv_bytes = {value} is less than {least}, what the plan takes with every head streaming")
    return int((least + np.cumsum(more) <= value).sum())
