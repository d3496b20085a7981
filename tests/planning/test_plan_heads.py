"""Plans per KV head: what `Plan` holds, its file, `solve(level="head")`, and DuoAttention folders."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published import LLAMA3, needs_published

import zigzag_ext as zz
from zigzag_ext.planning import exchange
from zigzag_ext.planning.plan import Plan

SIZES = {"sink": 4, "window": 8}
MASK = [[True, True, True], [True, False, True], [False, False, False]]
MASKS = st.integers(1, 5).flatmap(
    lambda heads: st.lists(st.lists(st.booleans(), min_size=heads, max_size=heads), min_size=1, max_size=12)
)


def test_derived_values():
    plan = Plan.from_heads(MASK, **SIZES)
    assert plan.kinds == ("retrieval", ("retrieval", "streaming", "retrieval"), "streaming")
    assert (plan.retrieval_layers, plan.mixed_layers, plan.streaming_layers) == ((0,), (1,), (2,))
    assert plan.kv_heads == 3 and plan.retrieval_ratio == pytest.approx(5 / 9)
    assert repr(plan) == "<Plan RMS: 1 retrieval, 1 streaming, 1 mixed, sink 4, window 8>"
    summary = plan.summary()
    assert "mixed      1: 1\n" in summary and "heads      55.6% retrieve" in summary
    with pytest.raises(ValueError, match="3 KV heads, these have 8"):
        plan.retrieval_heads(8)


def test_whole_layers_are_the_plan_of_layers():
    plan = Plan.from_heads([[True] * 4, [False] * 4], **SIZES)
    assert plan == Plan(["retrieval", "streaming"], **SIZES) and plan.kv_heads is None and plan.mixed_layers == ()
    assert plan.retrieval_heads(2) == ((True, True), (False, False))


@given(mask=MASKS)
def test_round_trip(mask, tmp_path_factory):
    plan = Plan.from_heads(np.array(mask), **SIZES)
    assert plan.retrieval_heads(len(mask[0])) == tuple(map(tuple, mask))
    path = tmp_path_factory.getbasetemp() / "heads.json"
    plan.save(path)
    assert Plan.load(path) == plan and hash(Plan.load(path)) == hash(plan)


def test_the_file_has_the_oldest_version_that_can_hold_it(tmp_path):
    path = tmp_path / "plan.json"
    Plan.from_heads(MASK, **SIZES).save(path)
    content = json.loads(path.read_text())
    assert content["version"] == 3 and content["kinds"][1] == ["retrieval", "streaming", "retrieval"]
    Plan(["retrieval", "streaming"], **SIZES).save(path)
    assert json.loads(path.read_text())["version"] == 1
    path.write_text(json.dumps(content | {"version": 7}))
    with pytest.raises(ValueError, match="version 7, from a newer zigzag_ext"):
        Plan.load(path)


@pytest.mark.parametrize(
    "kinds, error, message",
    [
        ([["retrieval", "full"]], ValueError, 'layer 0 has a KV head of the kind "full"; supported: retrieval, streaming'),
        (["retrieval", []], ValueError, "layer 1 has no KV heads"),
        ([["retrieval", "streaming"], ["streaming", "retrieval", "retrieval"]], ValueError, "one number of KV heads"),
        ([["retrieval", 1]], TypeError, "for layer 0"),
        ([{"retrieval"}], TypeError, "for layer 0"),
    ],
)
def test_bad_kinds(kinds, error, message):
    with pytest.raises(error, match=message):
        Plan(kinds, **SIZES)


@pytest.mark.parametrize("mask", [[], [[]], [[True], [True, False]]])
def test_bad_masks(mask):
    with pytest.raises(ValueError, match="all layers alike"):
        Plan.from_heads(mask, **SIZES)


@given(
    scores=st.lists(st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), min_size=3, max_size=3), min_size=1, max_size=9),
    share=st.floats(0, 1),
)
def test_solve_takes_the_best_heads(scores, share):
    matrix = np.array(scores)
    kept = np.array(zz.solve(matrix, share, level="head").retrieval_heads(3))
    assert kept.sum() == np.floor(share * matrix.size + 0.5)
    if kept.any() and not kept.all():
        assert matrix[kept].min() >= matrix[~kept].max()
        tied = matrix.ravel() == matrix[kept].min()  # of equal ones the first
        assert sorted(kept.ravel()[tied], reverse=True) == list(kept.ravel()[tied])


@given(share=st.floats(0, 1), seed=st.integers(0, 99))
def test_sparsity_is_duo_attentions_quantile(share, seed):
    """duo_attn/utils.py: full iff score >= np.quantile(scores, sparsity); all stream at 1. Scores without ties."""
    matrix = np.random.default_rng(seed).permutation(24).reshape(6, 4) / 24
    duo = matrix >= np.quantile(matrix, share) if share < 1 else np.zeros_like(matrix, dtype=bool)
    found = np.array(zz.solve(matrix, level="head", sparsity=share).retrieval_heads(4))
    near = abs(share * 23 - round(share * 23)) < 1e-9  # the interpolated quantile is a score, up to rounding
    assert (found == duo).all() or (near and abs(int(found.sum()) - int(duo.sum())) <= 1)


def test_budgets_of_heads():
    matrix = [[0.9, 0.1], [0.5, 0.5]]
    plan = zz.solve(matrix, level="head", threshold=0.5, context=1000, **SIZES)
    assert plan.retrieval_heads(2) == ((True, False), (True, True))
    assert plan.retained_score == pytest.approx(0.95) and plan.provenance["level"] == "head"
    head_bytes = 2 * 2 * 128  # K and V of a token
    assert plan.provenance["kv_bytes"] == head_bytes * (3 * 1000 + 12)
    plan = zz.solve(matrix, level="head", kv_bytes=head_bytes * (2 * 1000 + 2 * 12), context=1000, **SIZES)
    assert plan.retrieval_heads(2) == ((True, False), (True, False))
    assert plan.provenance["kv_bytes"] == head_bytes * (2 * 1000 + 2 * 12)
    less = zz.solve(matrix, level="head", kv_bytes=plan.provenance["kv_bytes"] - 1, context=1000, **SIZES)
    assert less.provenance["retrieval_heads"] == 1


def step_ms(plan, ms: list, other: float) -> float:
    """Milliseconds of a plan by the definition of a cost table; ms: of a layer by the number of heads that retrieve."""
    return sum(ms[sum(heads)] for heads in plan.retrieval_heads(len(ms) - 1)) + other


@pytest.mark.parametrize("ms", [[0.1, 0.3, 0.5], [0.1, 0.7, 0.4], [0.0, 0.0, 1.0]], ids=["rising", "mixed is dearest", "free"])
def test_the_most_heads_that_fit_into_a_time(ms):
    """Against every number of best heads; also where a layer of both kinds, two calls, takes longer than a retrieval layer."""
    matrix = np.random.default_rng(1).random((5, 2))
    table = {"context": [1000, 3000], "other": 0.25, "mixed": [[ms[1]], [3 * ms[1]]]}
    table |= {"retrieval": [ms[2], 3 * ms[2]], "streaming": [ms[0], 3 * ms[0]]}
    options = {"level": "head", "costs": table, "context": 2000, **SIZES}
    plans = [zz.solve(matrix, count / 10, **options) for count in range(11)]
    times = [step_ms(plan, [2 * each for each in ms], 0.25) for plan in plans]
    assert [plan.provenance["ms"] for plan in plans] == pytest.approx(times)
    for limit in (min(times), np.median(times), max(times)):
        found = zz.solve(matrix, ms=limit, **options)
        expected = max(count for count, time in enumerate(times) if time <= limit + 1e-9)
        assert (found.provenance["retrieval_heads"], found.kinds) == (expected, plans[expected].kinds)
    with pytest.raises(ValueError, match="ms = 0.2 cannot be met; the cheapest possible ms is"):
        zz.solve(matrix, ms=0.2, **options)


def test_a_time_for_heads_needs_the_times_of_mixed_layers(tmp_path):
    table, scores = {"context": [1000], "retrieval": [0.2], "streaming": [0.1]}, [[0.1, 0.9, 0.5], [0.2, 0.8, 0.4]]
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(table))
    for costs in (table, path):
        with pytest.raises(ValueError, match="missing mixed, the time of layers with heads of both kinds"):
            zz.solve(scores, ms=1, costs=costs, context=1000, level="head")
    with pytest.raises(ValueError, match="a list of 2, one number for each count of retrieval heads from 1 to 2"):
        zz.solve(scores, ms=1, costs=table | {"mixed": [[0.1]]}, context=1000, level="head")
    with pytest.raises(ValueError, match=r"ms must lie in \[0, "):
        zz.solve(scores, ms=float("inf"), costs=table | {"mixed": [[0.1, 0.1]]}, context=1000, level="head")
    one = zz.solve([[0.1], [0.2]], ms=0.3, costs=table, context=1000, level="head")
    assert one.retrieval_layers == (1,)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"objective": "count"}, "objective cannot be used"),
        ({"retrieval_layers": 1}, "retrieval_layers cannot be used"),
        ({"force_retrieval": [0], "stages": 2}, "force_retrieval, stages cannot be used"),
        ({"retrieval_ratio": 0.5, "sparsity": 0.5}, "one budget at a time"),
        ({"sparsity": 1.5}, "sparsity must lie in"),
        ({"threshold": -1}, "threshold must lie in"),
        ({"kv_bytes": 3}, "cheapest possible kv_bytes is"),
        ({"scores": [[2.0]]}, "numbers in"),
        ({"scores": [[float("nan")]]}, "numbers in"),
        ({"scores": [1.0]}, "matrix"),
        ({"level": "token"}, "supported: 'layer'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        zz.solve(**{"scores": [[0.1, 0.9], [0.2, 0.8]], "level": "head", **options})


def test_duo_folders_both_ways(tmp_path):
    plan = Plan.from_heads(MASK, **SIZES)
    exchange.to_duo(plan, tmp_path / "duo", kv_heads=3)
    assert exchange.from_duo(tmp_path / "duo").kinds == plan.kinds
    sparsity = json.loads((tmp_path / "duo" / "config.json").read_text())["sparsity"]
    assert sparsity == pytest.approx(4 / 9)
    assert exchange.from_duo(tmp_path / "duo", sparsity=sparsity).kinds == plan.kinds
    assert exchange.from_duo(tmp_path / "duo", threshold=0.5).kinds == plan.kinds
    with pytest.raises(ValueError, match="3 KV heads"):
        exchange.to_duo(plan, tmp_path / "other", kv_heads=4)
    assert not (tmp_path / "other").exists()
    for function in (exchange.to_layer_types, exchange.to_layer_string):
        with pytest.raises(ValueError, match="layers 1 mix heads"):
            function(plan)


@needs_published
def test_a_published_pattern_by_its_own_rule():
    scores = zz.load_scores(LLAMA3)
    plan = exchange.from_duo(LLAMA3, sparsity=0.5)
    assert plan.provenance["retrieval_heads"] == 128 and len(plan.mixed_layers) == 31  # of 32 layers
    above = scores > np.quantile(scores, 0.5)
    assert (np.array(plan.retrieval_heads(8)) >= above).all()
    assert (plan.sink, plan.window) == (128, 256)
