"""The two tables of a comparison, and how they are written."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import combinations

from ..evaluate import Row
from ..evaluate.results import kinds_of
from .plans import Choice, jaccard, retrieves
from .settings import FULL


@dataclass(frozen=True)
class Line:
    """How the plan of a method did on a task at a length. The columns from `task` on are those of `evaluate.Row`."""

    model: str
    device: str
    dtype: str
    method: str  # "full": the model's own attention; its level, equal and limit are empty
    level: str  # layer: whole layers retrieve or stream; head: every KV head for itself
    equal: str  # kv_bytes or ms: what plans of all methods at a ratio have as their limit
    ratio: float  # share of the layers from which the limit follows
    limit: float | None  # KV bytes, or milliseconds
    kv_bytes: int  # of the plan, for one sequence at `context` tokens
    ms: float | None  # of a decode step's attention at `context` tokens, by the cost table; nothing: there was none
    ms_from: str  # the file of the cost table, or the machine on which it was measured
    context: int
    retrieves: float  # share of all KV heads of full-attention layers
    kinds: str  # as in `evaluate.Row`
    sink: int
    window: int
    task: str
    length: int
    seed: int
    prompts: int
    exact: float  # with its 95% interval, as the log-probability
    exact_low: float
    exact_high: float
    logprob: float
    logprob_low: float
    logprob_high: float


_MEASURED = [field.name for field in fields(Line)][16:]


@dataclass(frozen=True)
class Overlap:
    """How much the plans of two methods have in common, in retrieval layers (level layer) or heads (level head)."""

    level: str
    equal: str
    ratio: float
    method: str
    other: str
    jaccard: float  # both / either
    both: int
    either: int


def line_of(choice: Choice | None, row: Row, kv_heads: int, whole: dict, ms_from: str) -> Line:
    """choice: None for full attention. whole: context, and KV bytes and milliseconds of full attention."""
    measured = {name: getattr(row, name) for name in _MEASURED}
    told = {"model": row.model, "device": row.device, "dtype": row.dtype, "ms_from": ms_from, **whole}
    if choice is None:
        alone = {"method": FULL, "level": "", "equal": "", "ratio": 1.0, "limit": None, "retrieves": 1.0}
        return Line(**told, **alone, kinds=row.kinds, sink=row.sink, window=row.window, **measured)
    plan, made = choice.plan, choice.plan.provenance
    told |= {"kv_bytes": made["kv_bytes"], "ms": made.get("ms")}
    names = {name: getattr(choice, name) for name in ("method", "level", "equal", "ratio", "limit")}
    share = float(retrieves(plan, kv_heads).mean())
    return Line(**told, **names, retrieves=share, kinds=kinds_of(plan), sink=plan.sink, window=plan.window, **measured)


def overlaps(chosen: Sequence[Choice], kv_heads: int) -> list[Overlap]:
    """Every two methods at every level, budget and ratio."""
    found = []
    for key in dict.fromkeys(choice.key for choice in chosen):
        for one, other in combinations([choice for choice in chosen if choice.key == key], 2):
            masks = [retrieves(choice.plan, kv_heads) for choice in (one, other)]
            if one.level == "layer":
                masks = [mask.any(1) for mask in masks]
            found.append(Overlap(*key, one.method, other.method, *jaccard(*masks)))
    return found


def as_csv(kind: type, lines: Iterable) -> bytes:
    """The lines of one kind, `Line` or `Overlap`, below the names of their columns."""
    text = io.StringIO()
    written = csv.writer(text, lineterminator="\n")
    written.writerow(field.name for field in fields(kind))
    for line in lines:
        written.writerow(f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in astuple(line))
    return text.getvalue().encode()
