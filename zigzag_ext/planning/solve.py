"""`solve`: from a matrix of head scores to a plan. Needs neither a model nor weights nor a GPU."""

import hashlib
import math
import operator
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .. import _C
from .costs import ms_costs
from .kv_format import KvFormat, parse_kv_format
from .layers import geometries
from .native import native_windows
from .origin import check_geometry, element_bytes_of, known, origin_of
from .plan import Plan
from .scores import as_array
from .solve_heads import solve_heads
from .solve_native import Layers

_TICKS = 10_000  # per millisecond: costs are compared in whole steps of 0.1 us, finer than a measurement resolves
_MOST = {"kv_bytes": 2**52, "ms": 2**52 / _TICKS}


def objectives() -> dict[str, str]:
    """Every objective that `solve` knows: its name and what it does, in one line."""
    return _C.objectives()


def solve(
    scores: ArrayLike,
    retrieval_ratio: float | None = None,
    objective: str = "mean",
    *,
    retrieval_layers: int | None = None,
    kv_bytes: float | None = None,
    ms: float | None = None,
    costs: Mapping | str | os.PathLike | None = None,
    context: int = 131072,
    config: Any = None,
    head_dim: int | Sequence[int] | None = None,
    element_bytes: int | None = None,
    kv_format: KvFormat | str | Mapping[str, str] | None = None,
    ring_kv_format: KvFormat | str | Mapping[str, str] | None = None,
    rollback: int = 0,
    force_retrieval: Sequence[int] = (),
    force_streaming: Sequence[int] = (),
    max_streaming_run: int | None = None,
    stages: int | Sequence[int] | None = None,
    threshold: float | None = None,
    sparsity: float | None = None,
    top_heads: int | None = None,
    values: Sequence[float] | None = None,
    level: str = "layer",
    sink: int = 64,
    window: int = 256,
    native: Sequence[int | None] = (),
) -> Plan:
    """Makes the best layers under `objective` retrieval layers and lets the others stream. Exact and deterministic.

    Args:
        scores: [layers, kv_heads] in [0, 1], how much each KV head needs the whole context (`load_scores` reads them).
        retrieval_ratio: budget: share of retrieval layers, in [0, 1]. Exactly retrieval_ratio * layers of them are chosen,
            rounded to the nearest integer, halves up. 0.5 where no budget is given.
        objective: one of `objectives()`: "mean" (retained score), "count" and "transport" (closest to DuoAttention's head mask:
            heads that differ, and work to move heads along the layers), "max" (largest score lost), "cvar" (mean of the top
            heads), "knapsack" (your own layer `values`), "even" (no scores).
        retrieval_layers: budget: exactly so many retrieval layers.
        kv_bytes: budget: most KV bytes of one sequence at `context` tokens, with `head_dim`, `element_bytes` and the formats.
        ms: budget: most milliseconds per token at `context` tokens by the cost table `costs` (see `costs.py`), compared
            in steps of 0.0001.
        costs: cost table, a dict or a JSON file.
        context: tokens, for KV bytes and milliseconds.
        config: the config of the model that the plan is for: of transformers, or a dict as in config.json. Scores of other
            layers, KV heads or head_dim are refused, and `head_dim` and `element_bytes` are the model's where they are not given.
            Where its layers differ in KV heads, the memory of each is that of its own.
        head_dim, element_bytes: elements per head (one number or one per layer) and bytes per element, for KV bytes. Without a
            config, the head_dim that the scores record, or 128, and 2 bytes.
        kv_format, ring_kv_format: how the plan's retrieval and streaming layers hold keys and values, see `Plan`.
        rollback: slots of each ring beyond sink + window, for KV bytes.
        force_retrieval, force_streaming: layers whose kind is given.
        max_streaming_run: most streaming layers in a row.
        stages: pipeline stages, all with the same number of retrieval layers: how many stages of equal length, or the layers
            of each.
        threshold, sparsity: the head mask, for "count", "transport" and `mask_distance`: heads that score at least `threshold`,
            or all but DuoAttention's share `sparsity` (the quantile). By default as many heads as the plan's layers hold.
        top_heads: heads that "cvar" averages per layer; default a quarter of them, rounded up.
        values: [layers], what a retrieval layer is worth to "knapsack"; default its mean score.
        level: "layer", or "head": DuoAttention's rule, every KV head for itself. Then `retrieval_ratio` is the share of heads
            (rounded to the nearest number of heads, halves up), `kv_bytes` the largest number of heads that fits, `threshold` and
            `sparsity` are budgets of their own; the other budgets, objectives and constraints are for layers. Heads are taken by
            score, of equal ones the lower layer first, then the lower head.
        sink, window: tokens that streaming layers keep, see `Plan`.
        native: the windows of a model's own, None for layers without one; by default what `config` says. Scores then have
            a row per full-attention layer, which are what is chosen and what ratios, `values`, the lists of a cost table and
            the record speak of. Layer numbers, `stages` and `head_dim` are the model's, KV bytes those of the whole model.

    Under kv_bytes and ms, the best set of layers that fits is chosen. "even", "count" and "transport" can compare sets of one
    size only: they get as many retrieval layers as fit at the layers' average cost, or the next smaller possible number, or the
    next larger. Of choices that serve equally well, the larger retained score wins (not for "even"), then the choice whose first
    difference is a retrieval layer.

    Returns:
        A plan whose provenance records the objective, budget and constraints, `objective_value`, `retained_score` (share of the
        summed scores that lies in retrieval layers), `layer_values` (how the objective rates each layer), `mask_distance` (heads
        whose layer has the other kind than they have in the head mask), `kv_bytes`, with `costs` `ms`, and `origin`: what the
        scores and the config say of model, method and geometry (`origin.py`).

    Raises:
        ValueError: input is out of range, more than one budget is given, scores and config differ in geometry, or no choice meets
            budget and constraints (the message names the ones that conflict). TypeError: an argument has the wrong type.

    Source: the split into retrieval and streaming heads by score is DuoAttention's (https://arxiv.org/abs/2410.10819), whole
    layers of one kind are ZigzagAttention's (https://arxiv.org/abs/2508.12407). The criteria are this package's own.

    Example:
        >>> solve([[0.9, 0.8], [0.1, 0.3], [0.2, 0.7]], retrieval_ratio=1 / 3).retrieval_layers
        (0,)
    """
    if level not in ("layer", "head"):
        raise ValueError(f"level {level!r} is not supported; supported: 'layer' (whole layers retrieve or stream), 'head'")
    matrix = _matrix(scores)
    layers, kv_heads = matrix.shape if matrix.ndim == 2 else (0, 0)
    origin = _origin(scores, layers, kv_heads, config)
    model = Layers(native or (() if config is None else native_windows(config)), layers)
    mask = {"threshold": threshold, "sparsity": sparsity}
    given = {"retrieval_ratio": retrieval_ratio, "retrieval_layers": retrieval_layers, "kv_bytes": kv_bytes, "ms": ms}
    budget = _budget(given | (mask if level == "head" else {}), costs)
    constraints = _constraints(len(model), force_retrieval, force_streaming, max_streaming_run, stages)
    own = _own_options(mask, top_heads, values)
    sizes = _sizes(context, head_dim, element_bytes, origin, config)
    _C.check_plan(["streaming"], _integer("sink", sink), _integer("window", window))
    formats = {"kv_format": kv_format, "ring_kv_format": ring_kv_format}
    shape = {name: parse_kv_format(name, value) for name, value in formats.items()} | {"sink": sink, "window": window}
    bytes_of = model.kv_costs(**{"kv_heads": kv_heads} | sizes, **shape, rollback=_integer("rollback", rollback))
    sizes |= {"rollback": rollback} if rollback else {}
    ticks_of = None if costs is None else _in_ticks(*ms_costs(costs, sizes["context"], layers))
    if level == "head":
        for_layers = {"objective": objective != "mean", "ms": ms, "retrieval_layers": retrieval_layers, **constraints}
        _refuse_for_heads(for_layers | {"top_heads": top_heads, "values": own["values"], "costs": costs})
        plan = solve_heads(matrix, budget, bytes_of, {**sizes, "origin": origin, "scores": _fingerprint(matrix)}, shape)
        return plan.with_native(model.windows)
    settings = {**model.rows(constraints), **own}
    solution = _C.solve(matrix, _options(objective, settings, budget, layers, bytes_of, ticks_of))
    provenance = {
        "objective": objective,
        "budget": budget,
        "constraints": {name: value for name, value in constraints.items() if value},
        "options": {name: value for name, value in own.items() if value not in (None, [])},
        **_result(solution, bytes_of, ticks_of),
        **sizes,
        "origin": origin,
        "scores": _fingerprint(matrix),
        "layer_values": solution.layer_values,
    }
    recorded = {name: value for name, value in provenance.items() if value != {}}
    return Plan(solution.kinds, **shape, provenance=recorded).with_native(model.windows)


def _own_options(mask: dict, top_heads: int | None, values: Sequence[float] | None) -> dict:
    """What single objectives take, checked."""
    own = {name: _optional(_number, name, value) for name, value in mask.items()}
    own["top_heads"] = _optional(_integer, "top_heads", top_heads)
    own["values"] = [] if values is None else [_number("values", value) for value in values]
    return own


def _refuse_for_heads(settings: dict) -> None:
    if given := [name for name, value in settings.items() if value not in (None, [], False)]:
        raise ValueError(f"{', '.join(given)} cannot be used with level='head': they are about whole layers")


def _origin(scores, layers: int, kv_heads: int, config) -> dict:
    """What the plan is made for: what the scores know of it, then the config. ValueError if these are two geometries."""
    recorded = known(getattr(scores, "origin", None)) | {"layers": layers, "kv_heads": kv_heads}
    model = {} if config is None else origin_of(config)
    if model and layers:
        check_geometry(recorded, model | {"layers": native_windows(config).count(None)}, "scores are for")
    return known(model | recorded)


def _constraints(layers: int, force_retrieval, force_streaming, max_streaming_run, stages) -> dict:
    return {
        "force_retrieval": _integers("force_retrieval", force_retrieval),
        "force_streaming": _integers("force_streaming", force_streaming),
        "max_streaming_run": _optional(_integer, "max_streaming_run", max_streaming_run),
        "stages": _stages(stages, layers),
    }


def _sizes(context: int, head_dim: int | Sequence[int] | None, element_bytes: int | None, origin: dict, config) -> dict:
    """What KV bytes depend on beside plan and formats, checked."""
    own = [] if config is None else geometries(config)
    kv_heads, head_dims = ([getattr(size, name) for size in own] for name in ("kv_heads", "head_dim"))
    if head_dim is None:
        head_dim = head_dims if len(set(head_dims)) > 1 else origin.get("head_dim", 128)
    if element_bytes is None:
        element_bytes = 2 if config is None else element_bytes_of(config)
    per_layer = isinstance(head_dim, Sequence) and not isinstance(head_dim, str)
    return {
        "context": _positive("context", context),
        "head_dim": [_positive("head_dim", dim) for dim in head_dim] if per_layer else _positive("head_dim", head_dim),
        "element_bytes": _positive("element_bytes", element_bytes),
        **({"kv_heads": kv_heads} if len(set(kv_heads)) > 1 else {}),
    }


def _result(solution: _C.Solution, bytes_of, ticks_of) -> dict:
    """What a plan records about itself."""
    return {
        "objective_value": solution.objective_value,
        "retained_score": solution.retained_score,
        "mask_distance": solution.mask_distance,
        "mask_heads": solution.mask_heads,
        "kv_bytes": _total(bytes_of, solution.kinds),
        "ms": {} if ticks_of is None else _total(ticks_of, solution.kinds) / _TICKS,
    }


def _fingerprint(matrix: np.ndarray) -> dict:
    return {"shape": list(matrix.shape), "sha256": hashlib.sha256(np.ascontiguousarray(matrix)).hexdigest()}


def _budget(given: dict, costs) -> dict:
    """The one budget that was given, by name."""
    budget = {name: _number(name, value) for name, value in given.items() if value is not None}
    if len(budget) > 1:
        raise ValueError(f"one budget at a time, got {' and '.join(budget)}")
    if "ms" in budget and costs is None:
        raise ValueError("the budget ms needs a cost table: costs=")
    return budget or {"retrieval_ratio": 0.5}


def _options(objective: str, settings: dict, budget: dict, layers: int, bytes_of, ticks_of) -> _C.SolveOptions:
    if not isinstance(objective, str):
        raise TypeError(f"objective must be a name, one of {', '.join(objectives())}, got {objective!r}")
    options = _C.SolveOptions()
    options.objective = objective
    for name, value in settings.items():
        if value is not None:
            setattr(options, name, value)
    _set_budget(options, budget, layers, bytes_of, ticks_of)
    return options


def _total(costs: tuple[list[int], list[int]], kinds: list[str]) -> int:
    """What a plan costs, from (retrieval, streaming) costs per layer."""
    return sum(costs[kind == "streaming"][layer] for layer, kind in enumerate(kinds))


def _set_budget(options, budget: dict, layers: int, bytes_of, ticks_of) -> None:
    [(name, value)] = budget.items()
    if name == "retrieval_ratio":
        options.retrieval_layers = _C.count_retrieval_layers(value, layers)
    elif name == "retrieval_layers":
        options.retrieval_layers = _integer(name, value)
    elif not 0 <= value < _MOST[name]:
        raise ValueError(f"{name} must lie in [0, {_MOST[name]:g}), got {value}")
    elif name == "kv_bytes":
        options.costs = _C.CostBudget(name, *bytes_of, math.floor(value), 1.0)
    else:
        options.costs = _C.CostBudget(name, *ticks_of, round(value * _TICKS), 1 / _TICKS)


def _in_ticks(retrieval: np.ndarray, streaming: np.ndarray, other: float) -> tuple[list[int], list[int]]:
    """Whole steps of 0.1 us per layer; what does not depend on the plan is counted with layer 0, whatever its kind."""
    kinds = [[round(cost * _TICKS) for cost in kind.tolist()] for kind in (retrieval, streaming)]
    for kind in kinds:
        kind[0] += round(other * _TICKS)
    return kinds[0], kinds[1]


def _stages(stages: int | Sequence[int] | None, layers: int) -> list[int]:
    if stages is None:
        return []
    if not isinstance(stages, Sequence) or isinstance(stages, str):
        count = _positive("stages", stages)
        if layers % count:
            raise ValueError(f"stages = {count} does not divide {layers} layers: give the layers of each stage, as a list")
        return [layers // count] * count
    return _integers("stages", stages)


def _optional(check, name: str, value):
    return None if value is None else check(name, value)


def _integers(name: str, values) -> list[int]:
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a list of integers, got {values!r}")
    return [_integer(name, value) for value in values]


def _integer(name: str, value) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if abs(value) >= 1 << 31:
        raise ValueError(f"{name} is too large: {value}")
    return value


def _positive(name: str, value) -> int:
    value = _integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _number(name: str, value) -> float | int:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return operator.index(value) if hasattr(value, "__index__") else float(value)


def _matrix(scores: ArrayLike) -> np.ndarray:
    try:
        matrix = as_array(scores)
    except ValueError as error:
        raise ValueError(f"scores must be a [layers, kv_heads] matrix: {error}") from error
    if matrix.dtype.kind not in "fiub":
        raise TypeError(f"scores must be real numbers, got an array of {matrix.dtype}")
    return matrix.astype(np.float64)
