"""Sampled tokens: the filters of generate(), the right frequencies, noise of seed and position alone."""

import collections
import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import zigzag_ext as zz
from zigzag_ext.serve.sampling import Draw, choose

LOGITS = torch.randn(1, 50, generator=torch.Generator().manual_seed(3)) * 3


def draws_of(count: int, seed: int = 7, **options) -> list[Draw]:
    sampling = zz.Sampling(1, **options)
    return [Draw(sampling, seed, position) for position in range(count)]


def warped(logits, temperature=1.0, top_k=None, top_p=1.0):
    """Probabilities as generate() samples from."""
    scores = TemperatureLogitsWarper(float(temperature))(None, logits)
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    return (TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores).softmax(-1)[0]


@pytest.mark.parametrize("options", [
    {"temperature": 1.0}, {"temperature": 0.3}, {"temperature": 2.0, "top_k": 4}, {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.6}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "top_k": 500},
])  # fmt: skip
def test_tokens_come_as_often_as_they_should(options):
    """Within five standard deviations, of 4,000 positions; none that generate() would filter out."""
    count, probs = 4000, warped(LOGITS, **options)
    seen = collections.Counter(choose(LOGITS.expand(count, -1), draws_of(count, **options)))
    for token, p in enumerate(probs.tolist()):
        assert abs(seen[token] - count * p) <= 5 * math.sqrt(count * p * (1 - p)) + 1e-9, token


def test_greedy_is_the_first_of_the_best():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]])
    assert choose(logits, draws_of(1)) == [1]


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 3}], ids=str)
@pytest.mark.parametrize("temperature", [1e-300, 5e-324])
def test_the_smallest_temperatures_choose_as_greedy_does(options, temperature):
    draws = draws_of(20, temperature=temperature, **options)
    assert choose(LOGITS.expand(20, -1), draws) == choose(LOGITS, draws_of(1)) * 20


def test_a_choice_depends_on_its_own_row_only():
    options = [{}, {"temperature": 1.0}, {"temperature": 0.5, "top_k": 3}, {"temperature": 2.0, "top_p": 0.9}]
    draws = [Draw(zz.Sampling(1, **options[i % 4]), i // 3, i) for i in range(24)]
    logits = torch.randn(24, 301, generator=torch.Generator().manual_seed(1))
    alone = [choose(logits[i : i + 1], draws[i : i + 1])[0] for i in range(24)]
    assert choose(logits, draws) == alone and len(set(alone)) > 8
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2)).tolist()
    assert choose(logits[order], [draws[i] for i in order]) == [alone[i] for i in order]


def test_seeds_and_positions_give_numbers_of_their_own():
    sampling = zz.Sampling(1, temperature=1.0)
    numbers = {Draw(sampling, seed, position).uniform for seed in (0, 1, 2**63, 2**64 - 1) for position in range(500)}
    assert len(numbers) == 2000 and min(numbers) >= 0 and max(numbers) < 1 and abs(sum(numbers) / 2000 - 0.5) < 0.03
    assert Draw(sampling, 7, 3).uniform == Draw(sampling, 7, 3).uniform


def test_numbers_stay_what_they_are():
    """So that a seed means the same in the next version."""
    numbers = [Draw(zz.Sampling(1), seed, position).uniform for seed, position in ((0, 0), (1, 0), (0, 1), (2**64 - 1, 10**6))]
    assert [round(number, 9) for number in numbers] == [0.011546754, 0.303568034, 0.502379604, 0.461425544]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2, "top_p": 0.5}])
def test_what_is_not_finite_is_told_by_row(options):
    logits = torch.zeros(4, 9)
    logits[0, 3], logits[2] = torch.nan, -torch.inf
    logits[3, :8] = -torch.inf  # as processors mask: what is left is chosen
    chosen = choose(logits, draws_of(4, **options))
    assert chosen[0] is None and chosen[1] is not None and chosen[2] is None and chosen[3] == 8


def test_half_precision_logits_are_chosen_from():
    assert choose(LOGITS.bfloat16(), draws_of(1)) == [int(LOGITS.bfloat16().argmax())]
    assert choose(LOGITS.half(), draws_of(1, temperature=0.7, top_p=0.9))[0] in range(50)


BAD = {
    "max_tokens must be at least 1, got 0": {"max_tokens": 0},
    "max_tokens must be an integer": {"max_tokens": 2.0},
    "temperature must be at least 0 and finite, got -1": {"temperature": -1},
    "temperature must be at least 0 and finite, got nan": {"temperature": math.nan},
    "temperature must be a number, got '1'": {"temperature": "1"},
    "top_k must be at least 1 token or None, got 0": {"top_k": 0},
    "top_p must be above 0 and at most 1, got 0": {"top_p": 0},
    "top_p must be above 0 and at most 1, got 1.1": {"top_p": 1.1},
    r"seed must be 0 to 2\^64 - 1 or None, got -1": {"seed": -1},
    "seed must be an integer or None, got 1.0": {"seed": 1.0},
    "ignore_eos must be True or False, got 1": {"ignore_eos": 1},
    "stop must be a string or several, none of them empty; got ''": {"stop": ""},
    r"none of them empty; got \['a', 3\]": {"stop": ["a", 3]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_named(message):
    with pytest.raises((TypeError, ValueError), match=message):
        zz.Sampling(**{"max_tokens": 5} | BAD[message])


def test_stop_may_be_one_string_or_several():
    assert zz.Sampling(1, stop="ab").stop == ("ab",) and zz.Sampling(1, stop=["a", "b"]).stop == ("a", "b")
