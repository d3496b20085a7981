"""`solve(level="head")`: every KV head for itself, by score alone, as DuoAttention deploys its gates."""

import math
from dataclasses import replace

import numpy as np

from .. import _C
from .plan import Plan

TICKS_PER_MS = 10_000  # costs are compared in whole steps of 0.1 us, finer than a measurement resolves


def solve_heads(
    scores: np.ndarray,
    budget: dict,
    bytes_of: tuple[list[int], list[int]],
    ms_of: tuple[np.ndarray, float] | None,
    provenance: dict,
    shape: dict,
) -> Plan:
    """The plan whose retrieval heads are the best ones of `scores` [layers, kv_heads] in [0, 1].

    Args:
        budget: {name: value}, one of retrieval_ratio, kv_bytes, ms, threshold, sparsity.
        bytes_of: KV bytes of every layer as a whole, as retrieval and as streaming layer.
        ms_of: milliseconds of every layer [layers, kv_heads + 1] by the number of its heads that retrieve, and beside the layers.
        provenance: what to record beside the result. shape: the plan's other arguments: sink, window and formats.

    Source: https://github.com/mit-han-lab/duo-attention (duo_attn/utils.py, sparsify_attention_heads). It breaks ties by random
    noise below 1e-6; here the lower layer wins, then the lower head.
    """
    if scores.ndim != 2 or not scores.size or not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError(f"scores must be a [layers, kv_heads] matrix of numbers in [0, 1], got shape {scores.shape}")
    [(name, value)] = budget.items()
    order = np.argsort(-scores.ravel(), kind="stable")
    head_bytes = [np.repeat(np.array(kind) // scores.shape[1], scores.shape[1]) for kind in bytes_of]
    ticks = None if ms_of is None else _ticks(order, *ms_of)
    if name == "ms":
        count = _largest(name, value, ticks, round(value * TICKS_PER_MS), 1 / TICKS_PER_MS)
    elif name == "kv_bytes":
        taken = np.concatenate([[0], np.cumsum((head_bytes[0] - head_bytes[1])[order])])
        count = _largest(name, value, int(head_bytes[1].sum()) + taken, value, 1)
    else:
        count = _count(name, value, scores)
    retrieval = np.zeros(scores.size, dtype=bool)
    retrieval[order[:count]] = True
    kept = float(scores.ravel()[retrieval].sum())
    recorded = {
        "level": "head",
        "budget": budget,
        "retrieval_heads": int(retrieval.sum()),
        "objective_value": kept / scores.size,
        "retained_score": kept / total if (total := float(scores.sum())) else 1.0,
        "kv_bytes": int(np.where(retrieval, *head_bytes).sum()),
        **({} if ticks is None else {"ms": int(ticks[count]) / TICKS_PER_MS}),
        **provenance,
    }
    return replace(
        Plan.from_heads(retrieval.reshape(scores.shape), sink=shape["sink"], window=shape["window"]), **shape, provenance=recorded
    )


def _count(name: str, value: float, scores: np.ndarray) -> int:
    """How many heads retrieve, by a budget that is about heads and their scores."""
    if name in ("threshold", "sparsity") and not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")
    if name == "retrieval_ratio":
        return _C.count_retrieval_layers(value, scores.size)
    if name == "threshold":
        return int((scores >= value).sum())
    # sparsity: what lies at or above the interpolated quantile, which is below a share of s (n - 1) of the others
    return 0 if value >= 1 else scores.size - math.ceil(value * (scores.size - 1))


def _ticks(order: np.ndarray, ms: np.ndarray, other: float) -> np.ndarray:
    """[heads + 1] ticks of a step in which the first 0, 1, 2 ... heads of `order` retrieve."""
    per_layer, kv_heads = np.rint(ms * TICKS_PER_MS).astype(np.int64), ms.shape[1] - 1
    layers, held = order // kv_heads, np.zeros(len(ms), dtype=np.int64)
    steps = [0]
    for layer in layers:
        steps.append(per_layer[layer, held[layer] + 1] - per_layer[layer, held[layer]])
        held[layer] += 1
    return int(per_layer[:, 0].sum()) + round(other * TICKS_PER_MS) + np.cumsum(steps)


def _largest(name: str, value: float, costs: np.ndarray, limit: float, unit: float) -> int:
    """The largest number of heads whose cost fits; costs [heads + 1] need not rise: a layer of both kinds is two calls."""
    fitting = np.flatnonzero(costs <= limit)
    if not len(fitting):
        raise ValueError(f"{name} = {value} cannot be met; the cheapest possible {name} is {int(costs.min()) * unit:.15g}")
    return int(fitting[-1])
