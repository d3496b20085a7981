"""The solver from Python: brute force, exact counts, nesting, permutations, the tie rule, and refused input."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zigzag_ext import _C
from zigzag_ext.plan import Plan
from zigzag_ext.solve import objectives, solve


@st.composite
def score_matrices(draw, max_layers=12, levels=None):
    """[layers, kv_heads] of multiples of 1 / levels: a power of two, so that sums are exact and ties real."""
    layers, kv_heads = draw(st.integers(1, max_layers)), draw(st.sampled_from([1, 2, 4, 8]))
    levels = levels or draw(st.sampled_from([1, 2, 4, 1 << 20]))
    cells = draw(st.lists(st.integers(0, levels), min_size=layers * kv_heads, max_size=layers * kv_heads))
    return np.array(cells, dtype=np.float64).reshape(layers, kv_heads) / levels


def choices(layers: int, count: int):
    """Every choice of `count` layers, the ones that prefer lower layers first."""
    return itertools.combinations(range(layers), count)


@settings(max_examples=150, deadline=None)
@given(scores=score_matrices(), data=st.data())
def test_mean_equals_brute_force(scores, data):
    layers = len(scores)
    count = data.draw(st.integers(0, layers))
    plan = solve(scores, count / layers, "mean")
    sums = scores.sum(1)
    best = max(choices(layers, count), key=lambda chosen: sum(sums[list(chosen)]))  # max keeps the first of equals
    assert plan.retrieval_layers == best
    total = scores.sum()
    assert plan.provenance["retained_score"] == pytest.approx(sums[list(best)].sum() / total if total else 1.0)
    assert plan.provenance["objective_value"] == pytest.approx(scores.mean(1)[list(best)].sum())
    np.testing.assert_allclose(plan.provenance["layer_values"], scores.mean(1))


@settings(max_examples=60, deadline=None)
@given(scores=score_matrices(max_layers=9), data=st.data())
def test_mean_is_the_nearest_exclusive_mask(scores, data):
    """In L1 and in squared L2 distance between the scores and a mask with whole layers of 0 or 1."""
    layers = len(scores)
    count = data.draw(st.integers(0, layers))
    chosen = solve(scores, count / layers, "mean").retrieval_layers

    def distance(layers_on, power):
        mask = np.zeros_like(scores)
        mask[list(layers_on)] = 1
        return (np.abs(mask - scores) ** power).sum()

    for power in (1, 2):
        least = min(distance(other, power) for other in choices(layers, count))
        assert distance(chosen, power) == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize("layers", range(1, 13))
def test_even_equals_brute_force(layers):
    rng = np.random.default_rng(layers)

    def unevenness(chosen, count):
        so_far = np.cumsum(np.isin(np.arange(layers), chosen))
        return np.abs(count * np.arange(1, layers + 1) / layers - so_far).sum()

    for count in range(layers + 1):
        plan = solve(rng.random((layers, 4)), count / layers, "even")
        costs = {chosen: unevenness(chosen, count) for chosen in choices(layers, count)}
        least = min(costs.values())
        first = next(chosen for chosen, cost in costs.items() if cost <= least + 1e-9)
        assert plan.retrieval_layers == first
        assert plan.provenance["objective_value"] == pytest.approx(least)


@pytest.mark.parametrize("objective", list(objectives()))
@given(layers=st.integers(1, 130), ratio=st.floats(0, 1))
@settings(deadline=None)
def test_exact_count(objective, layers, ratio):
    plan = solve(np.full((layers, 2), 0.5), ratio, objective)
    product = ratio * layers
    expected = math.floor(product) + (product - math.floor(product) >= 0.5)
    assert len(plan.retrieval_layers) == expected
    assert plan.num_layers == layers


@pytest.mark.parametrize(
    "layers, ratio, count", [(5, 0.5, 3), (3, 0.5, 2), (1, 0.5, 1), (10, 0.25, 3), (30, 0.4, 12), (32, 0.75, 24)]
)
def test_halves_round_up(layers, ratio, count):
    assert len(solve(np.zeros((layers, 1)), ratio).retrieval_layers) == count


@settings(max_examples=50, deadline=None)
@given(scores=score_matrices(max_layers=40))
def test_mean_sets_are_nested_over_budgets(scores):
    sets = [set(solve(scores, count / len(scores)).retrieval_layers) for count in range(len(scores) + 1)]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(sets))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), layers=st.integers(1, 30))
def test_permuting_layers_commutes_with_mean(data, layers):
    values = data.draw(st.lists(st.integers(0, 1 << 20), min_size=layers, max_size=layers, unique=True))  # no ties
    scores = np.array(values, dtype=np.float64)[:, None] / (1 << 20)
    order = np.array(data.draw(st.permutations(range(layers))))
    ratio = data.draw(st.floats(0, 1))
    kinds = np.array(solve(scores, ratio).kinds)
    assert solve(scores[order], ratio).kinds == tuple(kinds[order])


def test_ties_go_to_the_lower_layer():
    assert solve(np.full((6, 3), 0.5), 0.5).retrieval_layers == (0, 1, 2)
    assert solve([[0.1], [0.9], [0.5], [0.5], [0.5]], 0.6).retrieval_layers == (1, 2, 3)
    assert solve(np.zeros((4, 1)), 0.5, "even").retrieval_layers == (0, 2)


def test_even_ignores_the_scores():
    rng = np.random.default_rng(0)
    plans = {solve(rng.random((30, 3)), 0.4, "even").kinds for _ in range(5)}
    assert len(plans) == 1


def test_plan_and_provenance(tmp_path):
    plan = solve([[0.5, 1.0], [0.0, 0.25], [0.25, 0.0]], 1 / 3, sink=4, window=9)
    assert plan == Plan(
        ["retrieval", "streaming", "streaming"],
        sink=4,
        window=9,
        provenance={
            "objective": "mean",
            "retrieval_ratio": 1 / 3,
            "objective_value": 0.75,
            "retained_score": 0.75,
            "layer_values": [0.75, 0.125, 0.125],
        },
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    "make", [np.float32, np.float64, np.float16, lambda s: np.asfortranarray(s), lambda s: s[::-1][::-1], list]
)
def test_any_real_matrix(make):
    scores = np.array([[0.5, 0.25], [1.0, 0.75], [0.0, 0.0]])
    assert solve(make(scores), 1 / 3).retrieval_layers == (1,)


def test_scores_are_not_changed():
    scores = np.random.default_rng(0).random((8, 4))
    before = scores.copy()
    solve(scores)
    np.testing.assert_array_equal(scores, before)


def test_objectives_are_listed_with_a_description():
    assert {"mean", "even"} <= objectives().keys()
    assert all(text and "\n" not in text for text in objectives().values())
    assert objectives() == _C.objectives()


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
        ({"retrieval_ratio": None}, TypeError, "got None"),
        ({"objective": "median"}, ValueError, 'unknown objective "median"; known: mean, even'),
        ({"sink": -1}, ValueError, "sink"),
        ({"window": 0}, ValueError, "window"),
        ({"window": 1.5}, TypeError, "window"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error) as raised:
        solve(**{"scores": GOOD, **arguments})
    assert message in str(raised.value)
