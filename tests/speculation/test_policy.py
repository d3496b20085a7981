"""What "auto" drafts, by rounds of made-up times."""

import pytest

from zigzag_ext.speculation.policy import LEAST_KV, PROBE, STREAMING_TOKENS, Policy
from zigzag_ext.speculation.report import Report

NO_ROWS = {"lookup": 0, "streaming": 0}


def rounds(policy, source, number, kept, ms, plain_ms=10.0, kv=10, weights=1):
    """Plays rounds in which the source would keep `kept` tokens of a draft; returns how often it was asked."""
    asked = 0
    for _ in range(number):
        tokens = policy.tokens_for(source, kv, weights)
        asked += tokens > 0
        if tokens:
            policy.observe(source, tokens + 1, ms, 1, NO_ROWS | {source: 1}, NO_ROWS | {source: kept})
        else:
            policy.observe("plain", 1, plain_ms, 1, NO_ROWS, NO_ROWS)
    return asked


@pytest.mark.parametrize("draft", ["lookup", "streaming"])
def test_a_fixed_source_is_always_asked(draft):
    policy = Policy(draft, 5)
    assert rounds(policy, draft, 200, kept=0, ms=50.0) == 200
    assert policy.tokens_for("streaming" if draft == "lookup" else "lookup") == 0 and policy.tokens_for(draft) == 5


def test_off_never_drafts():
    policy = Policy("off", 5)
    assert policy.tokens_for("lookup") == policy.tokens_for("streaming", 100, 1) == 0


@pytest.mark.parametrize("source", ["lookup", "streaming"])
def test_what_pays_goes_on(source):
    policy = Policy("auto", 7)
    assert rounds(policy, source, 300, kept=2, ms=20.0) >= 290  # all but plain rounds that are timed
    assert policy.gain(source) == pytest.approx(1.5, abs=0.01)
    report = Report("auto")
    policy.summarise(report)
    assert report.gains.keys() == {source}


@pytest.mark.parametrize("source", ["lookup", "streaming"])
def test_what_does_not_pay_is_asked_ever_less(source):
    policy = Policy("auto", 7)
    first, later = (rounds(policy, source, 1000, kept=0, ms=20.0) for _ in range(2))
    assert first < 15 and later <= 4
    assert rounds(policy, source, 5000, kept=4, ms=20.0) > 2000, "text changes: what pays again is found again"


def test_a_few_failures_do_not_decide():
    """The first matches of a text are often by chance."""
    policy = Policy("auto", 7)
    for _ in range(3):
        policy.observe("plain", 1, 10.0, 1, NO_ROWS, NO_ROWS)
    assert rounds(policy, "lookup", 3, kept=0, ms=15.0) == 3 and policy.tokens_for("lookup") == 7


def test_a_draft_of_one_row_has_to_pay_for_all():
    policy = Policy("auto", 7)
    for _ in range(50):
        policy.observe("plain", 1, 10.0, 8, NO_ROWS, NO_ROWS)
        policy.observe("lookup", 8, 15.0, 8, NO_ROWS | {"lookup": 1}, NO_ROWS | {"lookup": 2})
    assert policy.gain("lookup") == pytest.approx((1 + 2 / 8) / 1.5, abs=0.01) and policy.tokens_for("lookup") == 0


def test_a_round_is_timed_plain_even_where_every_round_has_a_match():
    policy = Policy("auto", 7)
    assert rounds(policy, "lookup", 100, kept=0, ms=20.0) < 15


def test_the_first_round_of_a_kind_may_compile():
    policy = Policy("auto", 7)
    policy.observe("plain", 1, 60_000.0, 1, NO_ROWS, NO_ROWS)
    policy.observe("lookup", 4, 90_000.0, 1, NO_ROWS | {"lookup": 1}, NO_ROWS | {"lookup": 3})
    assert policy.ms == {} and policy.gain("lookup") is None


@pytest.mark.parametrize("kv,expected", [(LEAST_KV - 0.1, 0), (LEAST_KV, STREAMING_TOKENS)])
def test_the_streaming_draft_needs_more_bytes_of_kv_than_of_weights(kv, expected):
    assert Policy("auto", 7).tokens_for("streaming", kv * 100, 100) == expected
    assert Policy("auto", 2).tokens_for("streaming", kv * 100, 100) == min(expected, 2)
    assert PROBE > 1
