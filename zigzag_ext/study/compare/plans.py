"""The plans that are compared: of every method, level, budget and ratio one, all within the same bytes or milliseconds."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...planning.plan import Plan
from ...planning.solve import solve
from .settings import BUDGETS, EVEN, LEVELS, Settings, zeros_for

__all__ = ["BUDGETS", "LEVELS", "Choice", "choices", "jaccard", "retrieves"]


@dataclass(frozen=True)
class Choice:
    """A plan and what it was made for: the best one of `method` on its level within `limit` (KV bytes, or milliseconds)."""

    method: str
    level: str
    equal: str  # of `BUDGETS`: what it has in common with the other methods' plans
    ratio: float  # of the layers, from which `limit` follows
    limit: float
    plan: Plan

    @property
    def key(self) -> tuple:
        """What the choices of several methods are compared at."""
        return self.level, self.equal, self.ratio


def choices(scores: Mapping[str, np.ndarray | None], settings: Settings, config, element_bytes: int, costs=None) -> list[Choice]:
    """Every method's plan at every ratio, budget and level: ratio by ratio, so that an early end leaves whole comparisons.

    A ratio's budget is what a plan takes in which that share of the full-attention layers retrieves, evenly spaced (which ones
    matters only where a cost table has a number per layer). A method's plan is the best one by its scores that is not above the
    budget, `solve(kv_bytes=)` or `solve(ms=)`: what it takes may be less, where layers or heads do not fill the budget, and is
    recorded. `EVEN` has plans of whole layers only.

    Args:
        scores: by method, [full-attention layers, kv_heads]; None for `EVEN`.
        element_bytes: of a key or value. costs: a cost table, for the budget ms.
    """
    nothing = zeros_for(config)
    common = {"config": config, "element_bytes": element_bytes, "context": settings.tokens_of(config)}
    common |= {"sink": settings.sink, "window": settings.window, "costs": costs if "ms" in settings.budgets else None}
    found = []
    for ratio in settings.ratios:
        spread = solve(nothing, ratio, EVEN, **common)
        for equal in settings.budgets:
            limit = spread.provenance[equal]
            for level in settings.levels:
                for method, matrix in scores.items():
                    if matrix is None and level == "head":
                        continue
                    objective = EVEN if matrix is None else "mean"
                    plan = solve(nothing if matrix is None else matrix, None, objective, level=level, **{equal: limit}, **common)
                    found.append(Choice(method, level, equal, ratio, limit, plan))
    return found


def retrieves(plan: Plan, kv_heads: int) -> np.ndarray:
    """bool [full-attention layers, kv_heads]: which heads retrieve."""
    heads = plan.retrieval_heads(kv_heads)
    return np.array([heads[layer] for layer in plan.full_layers], dtype=bool)


def jaccard(one: np.ndarray, other: np.ndarray) -> tuple[float, int, int]:
    """Share of what either has that both have, and the two counts. 1 where neither has any."""
    both, either = int((one & other).sum()), int((one | other).sum())
    return both / either if either else 1.0, both, either
