"""Budgets, constraints, cost tables and refused input of `solve`. The search itself: tests/cpp/test_solver_brute_force.cpp."""

import itertools
import json
import math
import time

import numpy as np
import pytest

import zigzag_ext as zz
from zigzag_ext.planning.solve import objectives, solve

RNG = np.random.default_rng(0)
SCORES = RNG.random((12, 4))
TABLE = {"context": [1000, 2000], "retrieval": [0.1, 0.2], "streaming": [0.01, 0.01], "other": 1.0}


def kinds_of(layers, retrieval):
    return ["retrieval" if layer in retrieval else "streaming" for layer in range(layers)]


def test_the_default_budget_is_half_the_layers():
    assert solve(SCORES) == solve(SCORES, 0.5) and len(solve(SCORES).retrieval_layers) == 6


@pytest.mark.parametrize("layers", range(13))
def test_kv_bytes_is_what_the_scheduler_counts_and_a_budget_of_exactly_that_fits(layers):
    plan = solve(SCORES, retrieval_layers=layers, context=5000, head_dim=64, sink=3, window=40)
    scheduler = zz._C.Scheduler(plan.kinds, 3, 40, 8, 4, 64, "float16")
    size = plan.provenance["kv_bytes"]
    assert size == scheduler.kv_bytes(1, 5000)
    for budget, expected in [(size, layers), (size + 0.5, layers), (size - 1, layers - 1)]:
        if expected >= 0:
            again = solve(SCORES, kv_bytes=budget, context=5000, head_dim=64, sink=3, window=40)
            assert len(again.retrieval_layers) == expected


@pytest.mark.parametrize("objective", sorted(objectives()))
def test_equal_costs_are_a_count(objective):
    plan = solve(SCORES, objective=objective, ms=1.0 + 12 * 0.01 + 5 * 0.09, costs=TABLE, context=1000)
    assert plan.kinds == solve(SCORES, retrieval_layers=5, objective=objective).kinds
    assert plan.provenance["ms"] == pytest.approx(1.57)


def test_unequal_ms_against_brute_force():
    retrieval, streaming = RNG.uniform(0.05, 0.4, 10).round(4), RNG.uniform(0.01, 0.05, 10).round(4)
    table = {"context": [1000], "retrieval": [retrieval.tolist()], "streaming": [streaming.tolist()]}
    scores = RNG.random((10, 3))
    for limit in (0.5, 0.9, 1.3, 1.7):
        plan = solve(scores, ms=limit, costs=table, context=1000)
        fitting = [
            chosen
            for size in range(11)
            for chosen in itertools.combinations(range(10), size)
            if np.where(np.isin(range(10), chosen), retrieval, streaming).sum() <= limit + 1e-9
        ]
        best = max(fitting, key=lambda chosen: scores[list(chosen)].sum())
        assert plan.retrieval_layers == best
        used = np.where(np.isin(range(10), best), retrieval, streaming).sum()
        assert plan.provenance["ms"] == pytest.approx(used, abs=1e-9)


def test_a_sum_that_is_exactly_the_limit_fits():
    """0.1 + 0.1 + 0.1 > 0.3 in floating point."""
    table = {"context": [1], "retrieval": [0.1], "streaming": [0.0]}
    assert len(solve(SCORES, ms=0.3, costs=table, context=1).retrieval_layers) == 3


def test_costs_too_fine_to_search_are_refused():
    """Values equal to unrelated costs: every subset is on the Pareto front."""
    costs = np.random.default_rng(0).uniform(200, 900, 40)
    table = {"context": [1], "retrieval": [costs.tolist()], "streaming": [0.0]}
    with pytest.raises(ValueError, match="costs of the 40 layers differ in too many ways"):
        solve(np.zeros((40, 1)), objective="knapsack", values=costs, ms=costs.sum() / 2, costs=table, context=1)


def test_cost_tables_are_interpolated_and_read_from_files(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(TABLE))
    for costs in (TABLE, path, str(path)):
        plan = solve(SCORES, retrieval_layers=2, costs=costs, context=1500)
        assert plan.provenance["ms"] == pytest.approx(1.0 + 2 * 0.15 + 10 * 0.01)
    per_context = {**TABLE, "other": [1.0, 3.0]}
    assert solve(SCORES, retrieval_layers=0, costs=per_context, context=1500).provenance["ms"] == pytest.approx(2.12)


def test_constraints_hold_and_are_recorded():
    plan = solve(SCORES, retrieval_layers=6, force_retrieval=[0, 11], force_streaming=(3,), max_streaming_run=2, stages=3)
    retrieval = plan.retrieval_layers
    assert {0, 11} <= set(retrieval) and 3 not in retrieval
    assert [sum(4 * s <= layer < 4 * s + 4 for layer in retrieval) for s in range(3)] == [2, 2, 2]
    assert max(len(list(run)) for kind, run in itertools.groupby(plan.kinds) if kind == "streaming") <= 2
    assert plan.provenance["constraints"] == {
        "force_retrieval": [0, 11],
        "force_streaming": [3],
        "max_streaming_run": 2,
        "stages": [4, 4, 4],
    }
    assert solve(SCORES, retrieval_layers=6, stages=[4, 4, 4]).kinds == solve(SCORES, retrieval_layers=6, stages=3).kinds


@pytest.mark.parametrize("objective", sorted(objectives()))
@pytest.mark.parametrize(
    "options",
    [
        {"retrieval_ratio": 0.5},
        {"kv_bytes": 30e9},
        {"retrieval_layers": 60, "max_streaming_run": 8, "stages": 6, "force_retrieval": [0, 125], "force_streaming": [7]},
    ],
    ids=["ratio", "kv_bytes", "constraints"],
)
def test_126_layers_take_less_than_50_ms(objective, options):
    scores = np.random.default_rng(1).random((126, 8))

    def seconds():
        start = time.process_time()  # of this process: others may have the cores
        solve(scores, objective=objective, **options)
        return time.process_time() - start

    assert min(seconds() for _ in range(5)) < 0.05


def test_summary_shows_what_was_decided():
    text = solve(SCORES, kv_bytes=1e9, objective="count", force_retrieval=[5]).summary()
    for part in ("kv_bytes = 1e+09", "force_retrieval = [5]", "count", "retained score", "mask distance", "layers 8-11"):
        assert part in text
    assert text.count("*") == len(solve(SCORES, kv_bytes=1e9, objective="count", force_retrieval=[5]).retrieval_layers) + 1


GOOD = [[0.1, 0.2], [0.3, 0.4]]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"scores": [[0.1, math.nan], [0.3, 0.4]]}, ValueError, "got nan at layer 0, KV head 1"),
        ({"scores": [[0.1, 0.2], [math.inf, 0.4]]}, ValueError, "got inf at layer 1, KV head 0"),
        ({"scores": [[0.1, 0.2], [0.3, -0.5]]}, ValueError, "scores must lie in [0, 1], got -0.5 at layer 1, KV head 1"),
        ({"scores": [[2, 0.2]]}, ValueError, "got 2 at layer 0"),
        ({"scores": []}, ValueError, "[layers, kv_heads]"),
        ({"scores": [[]]}, ValueError, "[1, 0]"),
        ({"scores": np.zeros((0, 4))}, ValueError, "[0, 4]"),
        ({"scores": np.zeros((1025, 4))}, ValueError, "1 to 1024 layers and KV heads, got [1025, 4]"),
        ({"scores": [0.5, 0.5]}, ValueError, "1 dimensions"),
        ({"scores": 0.5}, ValueError, "0 dimensions"),
        ({"scores": np.zeros((2, 2, 2))}, ValueError, "3 dimensions"),
        ({"scores": [[0.1], [0.2, 0.3]]}, ValueError, "[layers, kv_heads]"),
        ({"scores": [["a"]]}, TypeError, "real numbers"),
        ({"scores": None}, TypeError, "real numbers"),
        ({"scores": [[1j]]}, TypeError, "real numbers"),
        ({"retrieval_ratio": -0.01}, ValueError, "retrieval_ratio must lie in [0, 1], got -0.01"),
        ({"retrieval_ratio": 1.5}, ValueError, "got 1.5"),
        ({"retrieval_ratio": math.nan}, ValueError, "got nan"),
        ({"retrieval_ratio": "0.5"}, TypeError, "retrieval_ratio must be a number"),
        ({"retrieval_ratio": 0.5, "kv_bytes": 1}, ValueError, "one budget at a time, got retrieval_ratio and kv_bytes"),
        ({"retrieval_layers": 3}, ValueError, "retrieval_layers must lie in [0, 2], the layers, got 3"),
        ({"retrieval_layers": -1}, ValueError, "got -1"),
        ({"retrieval_layers": 1.0}, TypeError, "retrieval_layers must be an integer, got 1.0"),
        ({"retrieval_layers": 1 << 40}, ValueError, "retrieval_layers is too large"),
        ({"kv_bytes": -1}, ValueError, "kv_bytes must lie in [0, "),
        ({"kv_bytes": math.nan}, ValueError, "got nan"),
        ({"kv_bytes": math.inf}, ValueError, "got inf"),
        ({"kv_bytes": 10}, ValueError, "kv_bytes = 10 cannot be met; the cheapest possible kv_bytes is 655360"),
        ({"kv_bytes": 1e9, "context": 0}, ValueError, "context must be at least 1, got 0"),
        ({"kv_bytes": 1e9, "head_dim": [64]}, ValueError, "head_dim must be one number or one per layer, 2, got 1"),
        ({"element_bytes": 0.5}, TypeError, "element_bytes must be an integer"),
        ({"ms": 1}, ValueError, "the budget ms needs a cost table"),
        ({"ms": 1, "costs": TABLE, "context": 999}, ValueError, "it covers contexts 1000 to 2000, not 999"),
        ({"ms": 1, "costs": {"context": [1]}}, ValueError, "cost table: missing retrieval, streaming"),
        ({"ms": 1, "costs": {**TABLE, "stream": 1}}, ValueError, "unknown stream"),
        ({"ms": 1, "costs": {**TABLE, "context": [2, 1]}}, ValueError, "ascending"),
        ({"ms": 1, "costs": {**TABLE, "streaming": [1, -1]}, "context": 1000}, ValueError, "at least 0"),
        (
            {"ms": 1, "costs": {**TABLE, "streaming": [1]}, "context": 1000},
            ValueError,
            "streaming must hold one number per context",
        ),
        ({"ms": 1, "costs": {**TABLE, "retrieval": ["a", "b"]}, "context": 1000}, ValueError, "retrieval must hold numbers"),
        ({"ms": 1, "costs": "nowhere.json"}, FileNotFoundError, "no cost table at nowhere.json"),
        ({"ms": 0.5, "costs": TABLE, "context": 1000}, ValueError, "ms = 0.5 cannot be met; the cheapest possible ms is 1.02"),
        ({"objective": "median"}, ValueError, 'unknown objective "median"; known: mean, count, transport'),
        ({"objective": None}, TypeError, "objective must be a name, one of mean, count"),
        ({"head_dim": "64"}, TypeError, "head_dim must be an integer"),
        ({"force_retrieval": [2]}, ValueError, "force_retrieval must hold layers 0 to 1, got 2"),
        ({"force_streaming": [-1]}, ValueError, "force_streaming must hold layers 0 to 1, got -1"),
        ({"force_streaming": "01"}, TypeError, "force_streaming must be a list of integers"),
        ({"force_retrieval": 1}, TypeError, "force_retrieval must be a list of integers"),
        ({"force_retrieval": [0], "force_streaming": [0]}, ValueError, "layer 0 is in both"),
        ({"max_streaming_run": 0}, ValueError, "max_streaming_run must be at least 1, got 0"),
        ({"stages": 3}, ValueError, "stages = 3 does not divide 2 layers"),
        ({"stages": [1, 2]}, ValueError, "stages must add up to the 2 layers, got 3"),
        ({"stages": [2, 0]}, ValueError, "at least one layer, got 0"),
        ({"threshold": 1.5}, ValueError, "threshold must lie in [0, 1], got 1.5"),
        ({"sparsity": math.nan}, ValueError, "sparsity must lie in [0, 1], got nan"),
        ({"threshold": 0.5, "sparsity": 0.5}, ValueError, "give one"),
        ({"objective": "cvar", "top_heads": 3}, ValueError, "top_heads must lie in [1, 2], the KV heads, got 3"),
        ({"top_heads": 1}, ValueError, 'top_heads belongs to objective "cvar"'),
        ({"objective": "knapsack", "values": [1]}, ValueError, "values must be one per layer, 2, got 1"),
        ({"objective": "knapsack", "values": [1, math.inf]}, ValueError, "values must be finite"),
        ({"values": [1, 2]}, ValueError, 'values belong to objective "knapsack"'),
        ({"objective": "transport", "threshold": 1.0}, ValueError, "nothing to move"),
        ({"level": "token"}, ValueError, "level 'token' is not supported; supported: 'layer'"),
        ({"sink": -1}, ValueError, "sink"),
        ({"window": 0}, ValueError, "window"),
        ({"window": 1.5}, TypeError, "window"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error) as raised:
        solve(**{"scores": GOOD, **arguments})
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"retrieval_layers": 1, "force_retrieval": [1, 2]},
            "no choice of layers meets all of: force_retrieval = [1, 2], retrieval_layers = 1; possible retrieval_layers: 2 to",
        ),
        (
            {"retrieval_layers": 4, "max_streaming_run": 2, "force_retrieval": [0, 1]},
            "all of: force_retrieval = [0, 1], max_streaming_run = 2, retrieval_layers = 4; possible retrieval_layers: 5 to 12",
        ),
        ({"retrieval_layers": 5, "stages": 3}, "retrieval_layers = 5; possible retrieval_layers: [0, 3, 6, 9, 12]"),
        ({"force_streaming": [4, 5, 6], "max_streaming_run": 2}, "force_streaming = [4, 5, 6], max_streaming_run = 2"),
        (
            {"kv_bytes": 1e12, "stages": [10, 1, 1], "force_streaming": [11], "force_retrieval": [0]},
            "all of: force_retrieval = [0], force_streaming = [11], equal counts in stages of [10, 1, 1] layers",
        ),
        ({"kv_bytes": 20e6, "force_retrieval": [3]}, "kv_bytes = 20000000; the cheapest possible kv_bytes is 275644416"),
    ],
)
@pytest.mark.parametrize("objective", sorted(objectives()))
def test_conflicts_are_named(arguments, message, objective):
    with pytest.raises(ValueError) as raised:
        solve(SCORES, objective=objective, **arguments)
    assert message in str(raised.value)
