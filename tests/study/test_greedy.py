"""Greedy elimination: the order is that of its definition, whatever the model; lazy or exhaustive, interrupted or not."""

import itertools

import numpy as np
import pytest

import zigzag_ext as zz
from zigzag_ext.study.evaluate.scoring import Verdict
from zigzag_ext.study.identify import answers

from .conftest import KV_HEADS, LAYERS

SMALL = {"sink": 4, "window": 32, "tokens": 1600, "prompts": 2}


class Landscape:
    """Stands in for `score`: the answers' log-probability as a made-up function of the set of streaming layers."""

    def __init__(self, monkeypatch, model, value):
        self.value, self.asked = value, []
        monkeypatch.setattr(answers, "score", self)
        self.layers = model.config.num_hidden_layers

    def __call__(self, model, samples, plan, batch_tokens):
        streaming = frozenset(range(plan.num_layers)) - frozenset(plan.retrieval_layers)
        self.asked.append(streaming)
        value = self.value(streaming)
        return [Verdict(False, -9.0, (value - 0.5, value + 1.0)), Verdict(True, -9.0, (value, value - 0.5))]  # mean: the value


@pytest.fixture
def deep(model, monkeypatch):
    """The tiny model's configuration with more layers; its attention is never computed here."""

    def of(layers, value):
        monkeypatch.setattr(model.config, "num_hidden_layers", layers)
        return Landscape(monkeypatch, model, value)

    return of


def order_of(scores):
    assert (scores == scores[:, :1]).all()
    return list(scores[:, 0].argsort())


def losses(singles, pairs=()):
    """Streaming a layer costs its entry of `singles`; having both layers of a pair stream costs that pair's value on top."""

    def value(streaming):
        together = sum(cost for pair, cost in dict(pairs).items() if streaming.issuperset(pair))
        return -1.0 - sum(singles[layer] for layer in streaming) - together

    return value


def definition(layers, value):
    """The order by the definition, without any memory of earlier rounds."""
    chosen = []
    while len(chosen) < layers:
        rest = [layer for layer in range(layers) if layer not in chosen]
        chosen.append(min(rest, key=lambda layer: (-value(frozenset([*chosen, layer])), layer)))
    return chosen


def test_order_of_a_real_model_is_that_of_the_definition(model, tokenizer):
    samples = [answers.Answers.sample(_bare(tokenizer), number) for number in range(2)]

    def value(streaming):
        kinds = ["streaming" if layer in streaming else "retrieval" for layer in range(LAYERS)]
        return np.mean([v.answers for v in zz.evaluate.score(model, samples, zz.Plan(kinds, sink=4, window=32))])

    scores = zz.identify(model, tokenizer, "greedy", exhaustive=True, **SMALL)
    assert order_of(scores) == definition(LAYERS, value)
    assert sorted(scores[:, 0]) == [0.0, 0.5, 1.0]


def _bare(tokenizer):
    from types import SimpleNamespace

    return SimpleNamespace(tokenizer=tokenizer, settings=SimpleNamespace(seed=0, tokens=SMALL["tokens"]))


def test_solve_gives_the_nested_sets_at_every_ratio(model, tokenizer, deep):
    deep(7, losses([0.5, 0.125, 2.0, 0.25, 1.0, 4.0, 0.75], {(1, 3): 8.0}))
    scores = zz.identify(model, tokenizer, "greedy", **SMALL)
    order = [1, 0, 6, 4, 2, 5, 3]
    assert scores.shape == (7, KV_HEADS) and order_of(scores) == order
    assert scores.min() == 0.0 and scores.max() == 1.0 and len(np.unique(scores)) == 7
    for count in range(8):
        plan = zz.solve(scores, retrieval_layers=7 - count, objective="mean")
        assert set(range(7)) - set(plan.retrieval_layers) == set(order[:count])


def test_layers_that_back_each_other_up_are_not_both_chosen(model, tokenizer, deep):
    """Alone, 0 and 1 cost least; together they destroy the answer. Half of the layers can stream for 0.5: 0 and 2."""
    value = losses([0.125, 0.25, 0.375, 0.5], {(0, 1): 10.0})
    deep(4, value)
    streaming = {}
    for method in ("ablation", "greedy"):
        plan = zz.solve(zz.identify(model, tokenizer, method, **SMALL), retrieval_layers=2)
        streaming[method] = frozenset(range(4)) - frozenset(plan.retrieval_layers)
    assert streaming["ablation"] == {0, 1} and value(streaming["ablation"]) < -10
    assert streaming["greedy"] == {0, 2}
    assert value(streaming["greedy"]) == max(value(frozenset(pair)) for pair in itertools.combinations(range(4), 2))


def test_equals_go_to_the_lowest_layer(model, tokenizer, deep):
    for exhaustive in (False, True):
        deep(5, losses([1.0] * 5))
        assert order_of(zz.identify(model, tokenizer, "greedy", exhaustive=exhaustive, **SMALL)) == [0, 1, 2, 3, 4]
        deep(4, losses([1.0, 0.5, 0.5, 0.5], {(1, 2): 0.5}))  # layer 2's cost rises to that of layer 0
        assert order_of(zz.identify(model, tokenizer, "greedy", exhaustive=exhaustive, **SMALL)) == [1, 3, 0, 2]


@pytest.mark.parametrize("seed", range(20))
def test_lazy_is_exhaustive_with_fewer_measurements_where_costs_never_fall(model, tokenizer, deep, seed):
    random = np.random.default_rng(seed)
    singles = random.integers(-4, 12, 9) / 8  # eighths: sums are exact, and equals occur; some layers do better streaming
    pairs = {pair: random.integers(1, 16) / 8 for pair in itertools.combinations(range(9), 2) if random.random() < 0.3}
    value = losses(singles, pairs)
    asked = {}
    for exhaustive in (False, True):
        landscape = deep(9, value)
        assert order_of(zz.identify(model, tokenizer, "greedy", exhaustive=exhaustive, **SMALL)) == definition(9, value)
        asked[exhaustive] = landscape.asked
    assert len(asked[True]) == 9 * 10 // 2 and len(asked[False]) < len(asked[True])
    assert set(asked[False]) < set(asked[True]) and len(set(asked[False])) == len(asked[False])


def test_only_exhaustive_sees_a_cost_that_falls(model, tokenizer, deep):
    """Layer 3 is useless without layer 0: its known cost of 4 is stale, and lazy evaluation believes it."""
    value = losses([0.125, 1.0, 2.0, 4.0], {(0, 3): -4.0})
    deep(4, value)
    assert order_of(zz.identify(model, tokenizer, "greedy", exhaustive=True, **SMALL)) == [0, 3, 1, 2]
    assert order_of(zz.identify(model, tokenizer, "greedy", **SMALL)) == [0, 1, 2, 3]


def test_keep_stops_early_and_ranks_the_rest_by_their_last_costs(model, tokenizer, deep):
    singles, pairs = [3.0, 0.5, 0.25, 1.0, 2.0], {(2, 3): 4.0}
    landscape = deep(5, losses(singles, pairs))
    steps = []
    scores = zz.identify(model, tokenizer, "greedy", keep=3, exhaustive=True, advance=lambda *at: steps.append(at), **SMALL)
    assert order_of(scores) == [2, 1, 4, 0, 3] and sorted(scores[:, 0]) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert steps == [(done, 10) for done in range(11)] and len(landscape.asked) == 1 + 5 + 4


@pytest.mark.parametrize("stop", range(1, 21))
def test_interrupted_anywhere_the_file_has_the_same_bytes(model, tokenizer, deep, tmp_path, stop):
    value = losses([0.3, 0.1, 0.2, 0.7, 0.4, 0.6], {(0, 1): 0.35, (2, 4): 0.9})
    landscape = deep(6, value)
    zz.identify(model, tokenizer, "greedy", output=tmp_path / "whole.tsv", **SMALL)
    whole = list(landscape.asked)

    def interrupt(done, total):
        assert total == 21
        if done == stop:
            raise KeyboardInterrupt

    landscape = deep(6, value)
    path = tmp_path / "scores.tsv"
    with pytest.raises(KeyboardInterrupt):
        zz.identify(model, tokenizer, "greedy", output=path, advance=interrupt, **SMALL)
    zz.identify(model, tokenizer, "greedy", output=path, **SMALL)
    assert path.read_bytes() == (tmp_path / "whole.tsv").read_bytes()
    assert landscape.asked == whole


@pytest.mark.parametrize("keep", [0, LAYERS])
def test_what_to_keep_has_bounds(model, tokenizer, keep):
    with pytest.raises(ValueError, match=f"keep must lie between 1 and {LAYERS - 1}.*got {keep}"):
        zz.identify(model, tokenizer, "greedy", keep=keep, **SMALL)
