"""The solver from Python: brute force, exact counts, nesting, permutations and the tie rule. Budgets: test_solve_budgets.py."""

import itertools
import math
import threading
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zigzag_ext import _C
from zigzag_ext.planning.plan import Plan
from zigzag_ext.planning.solve import objectives, solve


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


@settings(max_examples=150)
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


@settings(max_examples=60)
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


@settings(max_examples=50)
@given(scores=score_matrices(max_layers=40))
def test_mean_sets_are_nested_over_budgets(scores):
    sets = [set(solve(scores, count / len(scores)).retrieval_layers) for count in range(len(scores) + 1)]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(sets))


@pytest.mark.parametrize("objective", sorted(objectives().keys() - {"transport", "even"}))
@pytest.mark.parametrize("budget", ["retrieval_ratio", "kv_bytes"])
@settings(max_examples=30)
@given(data=st.data(), layers=st.integers(1, 30))
def test_permuting_layers_commutes_with_objectives_without_depth(objective, budget, data, layers):
    cells = data.draw(st.lists(st.integers(0, 1 << 20), min_size=2 * layers, max_size=2 * layers, unique=True))  # hardly any ties
    scores = np.array(cells, dtype=np.float64).reshape(layers, 2) / (1 << 20)
    order = np.array(data.draw(st.permutations(range(layers))))
    amount = data.draw(st.floats(0, 1)) if budget == "retrieval_ratio" else data.draw(st.integers(layers * 2560 * 320, 1 << 31))
    sums = scores.sum(1)
    assume(len(set(sums)) == layers)
    head_dim = data.draw(st.lists(st.sampled_from([64, 96, 128]), min_size=layers, max_size=layers))
    plan = solve(scores, objective=objective, head_dim=head_dim, **{budget: amount})
    permuted = solve(scores[order], objective=objective, head_dim=np.array(head_dim)[order].tolist(), **{budget: amount})
    assert permuted.objective_value == pytest.approx(plan.objective_value)
    assert permuted.retained_score == pytest.approx(plan.retained_score)
    if objective == "mean" and budget == "retrieval_ratio":
        assert permuted.kinds == tuple(np.array(plan.kinds)[order])


def test_transport_and_even_depend_on_depth():
    scores = np.array([[0.9], [0.8], [0.1], [0.0]])
    for objective, here, reversed_ in [("even", (0, 2), (0, 2)), ("transport", (0, 1), (2, 3))]:
        assert solve(scores, objective=objective).retrieval_layers == here
        assert solve(scores[::-1], objective=objective).retrieval_layers == reversed_


def test_transport_is_cumulative_rounding():
    """k(l) = round(C(l) / H) is the closed form; the search finds the same work."""
    rng = np.random.default_rng(3)
    for _ in range(50):
        layers, kv_heads = rng.integers(2, 40), rng.integers(1, 9)
        scores, count = rng.random((layers, kv_heads)), rng.integers(1, layers)
        plan = solve(scores, retrieval_layers=int(count), objective="transport")
        threshold = np.sort(scores, axis=None)[-count * kv_heads]
        heads = np.cumsum((scores >= threshold).sum(1))
        rounded = np.floor(heads / kv_heads + 0.5)
        assert plan.objective_value == pytest.approx(np.abs(heads - kv_heads * rounded).sum())


# By hand. Heads that retrieve at 0.5: 2, 1, 0, 1 of 2. Best heads: .9 .9 .4 1; means: .7 .5 .4 .6.
EXAMPLE = [[0.9, 0.5], [0.9, 0.1], [0.4, 0.4], [1.0, 0.2]]


@pytest.mark.parametrize(
    "objective, options, layers, value",
    [
        ("mean", {}, (0, 3), 1.3),
        ("count", {"threshold": 0.5}, (0, 3), 2),  # head 1 of layer 3 and head 0 of layer 1
        ("transport", {"threshold": 0.5}, (0, 3), 2),  # head of layer 1 two layers down; (0, 1) would take 2 too, retains less
        ("max", {}, (0, 3), 0.9),
        ("max", {"force_streaming": [0]}, (1, 3), 0.9),
        ("cvar", {"top_heads": 1}, (0, 3), 1.9),
        ("cvar", {"top_heads": 2}, (0, 3), 1.3),
        ("knapsack", {"values": [0, 3, 2, 1]}, (1, 2), 5),
        ("even", {}, (0, 2), 1),
    ],
)
def test_by_hand(objective, options, layers, value):
    plan = solve(EXAMPLE, objective=objective, **options)
    assert plan.retrieval_layers == layers
    assert plan.objective_value == pytest.approx(value)


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
    assert plan.kinds == ("retrieval", "streaming", "streaming") and (plan.sink, plan.window) == (4, 9)
    recorded = dict(plan.provenance)
    assert recorded.pop("scores")["shape"] == [3, 2]
    assert recorded == {
        "objective": "mean",
        "budget": {"retrieval_ratio": 1 / 3},
        "objective_value": 0.75,
        "retained_score": 0.75,
        "layer_values": [0.75, 0.125, 0.125],
        "mask_distance": 0,  # the two best heads are those of layer 0
        "mask_heads": 2,
        "kv_bytes": 2 * 2 * 2 * 128 * (131072 + 2 * 13),
        "context": 131072,
        "head_dim": 128,
        "element_bytes": 2,
        "origin": {"layers": 3, "kv_heads": 2},
    }
    assert (plan.objective_value, plan.retained_score) == (0.75, 0.75)
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


def test_other_threads_run_during_a_search():
    """A thread counts while another one searches: with Python's lock held, it would stand still in the middle of a search."""
    options = _C.SolveOptions()
    options.objective, options.retrieval_layers, options.max_streaming_run = "mean", 512, 40
    scores, spans, ticks = np.random.default_rng(0).random((1024, 8)), [], []
    start = time.perf_counter()
    _C.solve(scores, options)
    alone = time.perf_counter() - start

    def search():
        for _ in range(5):
            start = time.perf_counter()
            _C.solve(scores, options)
            spans.append((start + alone / 10, start + alone / 2))

    thread = threading.Thread(target=search)
    thread.start()
    while thread.is_alive():
        ticks.append(time.perf_counter())
    assert sum(any(begin < tick < end for tick in ticks) for begin, end in spans) >= 3, (alone, len(ticks))
