"""The plans that the evidence run compares, most telling first: by score and objective, per head, evenly spaced, random."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import zigzag_ext as zz
from zigzag_ext.cli import demo
from zigzag_ext.study.evaluate.results import kinds_of

OBJECTIVES = ("mean", "count", "transport", "knapsack")
RATIOS = (0.5, 0.4, 0.25, 0.6, 0.75)  # share of streaming layers; where methods differ most comes first
RANDOM_SEEDS = 5


@dataclass(frozen=True)
class Named:
    """A plan and how it came about. One plan may have several names."""

    source: str  # a method of identification, or none
    rule: str  # objective, "heads" for a head-level plan, or even, random, full, streaming, demo
    ratio: float  # of streaming layers, or of streaming heads
    plan: zz.Plan

    @property
    def kinds(self) -> str:
        return kinds_of(self.plan)

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.source, self.rule, f"{self.ratio:.0%}") if part)


def all_plans(
    scores: Mapping[str, np.ndarray], layers: int, kv_heads: int, ratios: Sequence[float], sink: int, window: int
) -> Iterator[Named]:
    """Every plan by every name: full and all streaming first, then ratio by ratio, the first one of `ratios` first."""
    sizes = {"sink": sink, "window": window}
    uniform = lambda kind: zz.Plan([kind] * layers, **sizes)  # noqa: E731
    yield Named("", "full", 0.0, uniform("retrieval"))
    yield Named("", "streaming", 1.0, uniform("streaming"))
    blank = np.zeros((layers, kv_heads))
    for ratio in ratios:
        even = zz.solve(blank, 1.0 - ratio, "even", **sizes)
        kept = len(even.retrieval_layers)
        yield Named("", "even", ratio, even)
        for source, matrix in scores.items():
            yield Named(source, "mean", ratio, zz.solve(matrix, 1.0 - ratio, "mean", **sizes))
            yield Named(source, "heads", ratio, zz.solve(matrix, 1.0 - ratio, level="head", **sizes))
        for seed in range(RANDOM_SEEDS):
            chosen = np.random.default_rng([seed, kept]).permutation(layers)[:kept]
            kinds = ["retrieval" if layer in chosen else "streaming" for layer in range(layers)]
            yield Named(f"seed{seed}", "random", ratio, zz.Plan(kinds, **sizes))
        for source, matrix in scores.items():
            for objective in OBJECTIVES[1:]:
                yield Named(source, objective, ratio, zz.solve(matrix, 1.0 - ratio, objective, **sizes))


def demo_plan() -> Named:
    """The plan that `zigzag demo` calls good, with its own sink and window."""
    plan = demo.demo_plans()["good plan"]
    return Named("", "demo", 1.0 - plan.retrieval_ratio, plan)


def in_ruler(named: Named) -> bool:
    """RULER generates its answers, which takes longer: it gets references, and at half of the layers the plans that do well."""
    if named.rule in ("full", "streaming", "demo"):
        return True
    chosen = (
        ("", "even"),
        *((source, "mean") for source in ("retrieval", "ablation", "greedy", "gates")),
        ("retrieval", "heads"),
    )
    return named.ratio == 0.5 and (named.source, named.rule) in chosen


def distinct(named: Sequence[Named]) -> list[Named]:
    """One of each plan, under its first name: different objectives often choose the same layers."""
    found: dict[str, Named] = {}
    for each in named:
        found.setdefault(canonical(each.kinds), each)
    return list(found.values())


def canonical(kinds: str) -> str:
    """`Row.kinds` with one character per layer where whole layers stream, though it may be written per head."""
    rows = kinds.split("/")
    whole = len(rows) > 1 and all(len(set(row)) == 1 for row in rows)
    return "".join(row[0] for row in rows) if whole else kinds
