"""A request gives the tokens that it gives alone, in any batch, order and slot, after any neighbour's end, in all formats."""

import pytest
from driving import GAPS, driven, ids_of, near_ties, plan_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import new_model

import zigzag_ext as zz

SAMPLINGS = [
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.5, "seed": 2, "top_p": 0.7},
    {"temperature": 1.0, "seed": 3, "top_k": 5},
    {"temperature": 0.7, "seed": (1 << 64) - 1, "top_k": 40, "top_p": 0.9},
]
SPECS = [  # tokens of the prompt, new tokens, how they are chosen
    (length, new, SAMPLINGS[0 if i % 2 else i // 2 % len(SAMPLINGS)])
    for i, (length, new) in enumerate([(1, 9), (5, 6), (16, 1), (17, 8), (23, 5), (40, 12), (70, 3), (9, 10), (130, 7), (33, 4)])
]
ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, len(SPECS) - 1)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 7)),
)


@pytest.fixture(scope="module", params=[*((name, True) for name in GAPS), ("none", False)], ids="{0[0]} {0[1]}".format)
def served(request):
    """A driver with 3 rows that reads prompts 24 tokens at a time, the gap of its format, and `Choices` by spec.

    Some read one prompt in a step, some all. Also where all that requests leave is kept, and prompts, which are beginnings of one
    text, go on from it.
    """
    name, prefix_cache = request.param
    options = {
        "prefill_chunk": 24,
        "queue": 64,
        "prefix_cache": prefix_cache,
        "max_stall_ms": 1e9 if name in ("none", "int8") else 1e-6,
    }
    with driven(new_model("llama"), plan_of(name), **options) as driver:
        yield driver, GAPS[name], {}


TEXT = ids_of(200, 3)


def request_of(driver, spec: int):
    length, new, options = SPECS[spec]
    return driver.submit(TEXT[:length], zz.Sampling(new, **options))


def test_any_schedule_gives_what_each_request_gives_alone(served, watched, record_property):
    driver, gap, alone = served
    for spec, (length, new, options) in enumerate(SPECS):
        if spec not in alone:
            alone[spec] = watched(driver, TEXT[:length], zz.Sampling(new, **options))
    counts, before = {"tokens": 0, "ties": 0}, driver.steps.cached_tokens

    @settings(max_examples=12, suppress_health_check=list(HealthCheck))
    @given(st.lists(ACTIONS, min_size=6, max_size=24))
    def run(actions):
        requests = []
        for action, number in actions:
            if action == "submit":
                requests.append((number, request_of(driver, number)))
            elif action == "step":
                driver.step(number)
            elif requests:
                requests[number % len(requests)][1].cancel()
        driver.finish()
        for spec, request in requests:
            done = request.result(0)
            ties = near_ties(done.token_ids, alone[spec], gap)
            assert request.is_cancelled or len(done.token_ids) == SPECS[spec][1]
            counts["tokens"] += len(done.token_ids)
            counts["ties"] += ties

    run()
    record_property("count of tokens in batches that are those of a request alone", counts["tokens"])
    record_property("count of choices in batches that differ at a near tie", counts["ties"])
    driver.drain()
    assert (driver.steps.cached_tokens > before) == driver.steps.prefixes.is_on
    assert counts["tokens"] > 100 and counts["ties"] <= counts["tokens"] // 50


def test_a_slot_forgets_who_was_there(served):
    """Longer than its successor, in the same row, cancelled half-way."""
    driver, _, _ = served
    first = driver.submit(ids_of(200), zz.Sampling(50))
    driver.until(lambda: len(first.tokens) > 3)
    row = first.job.row
    first.cancel()
    driver.drain()
    rows, tokens = [], []
    for _ in range(2):
        request = request_of(driver, 5)
        driver.step()
        rows.append(request.job.row)
        driver.drain()
        tokens.append(request.result(0).token_ids)
    assert rows == [row, row] and tokens[0] == tokens[1]


def test_smoothed_keys_of_a_slot_forget_who_was_there():
    """Prompts of up to 16 tokens set no offset: they must not find that of the row before."""
    with driven(new_model("llama"), plan_of("int8", key_smoothing=True), max_rows=2) as driver:
        requests = [driver.submit(ids_of(length), zz.Sampling(new)) for length, new in ((150, 2), (10, 8), (10, 8))]
        driver.until(lambda: requests[0].state == "decoding")
        offsets = [store.key_offset for store in driver.slots.cache.stores]
        rows = [request.job.row for request in requests[:2]]
        assert all(offset[rows[0]].any() and not offset[rows[1]].any() for offset in offsets)
        driver.drain()
        assert not any(offset.any() for offset in offsets)
        assert requests[1].result(0).token_ids == requests[2].result(0).token_ids
