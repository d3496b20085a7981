"""What becomes of requests: cancelled in every state, failed alone, as large as fits and one token larger; memory comes back."""

import pytest
import torch
from driving import driven, ids_of, plan_of
from tiny_models import VOCAB, new_model

import zigzag_ext as zz

PLAN = plan_of()
NEIGHBOUR = ids_of(37), zz.Sampling(14, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def driver():
    with driven(new_model("llama"), PLAN, prefill_chunk=24, max_rows=2) as driver:
        yield driver


@pytest.fixture(scope="module")
def alone(driver):
    """The neighbour's tokens when nothing runs beside it."""
    request = driver.submit(*NEIGHBOUR)
    driver.drain()
    return request.result(0).token_ids


def in_state(driver, state: str):
    """A request brought to a state, beside a neighbour that decodes. Returns both and what runs beside them."""
    neighbour, others = driver.submit(*NEIGHBOUR), []
    driver.until(lambda: neighbour.state == "decoding")
    if state in ("queued", "admitted beside"):
        others.append(driver.submit(ids_of(9), zz.Sampling(3)))  # has the other row
        driver.step()
    last = zz.Sampling(4)
    stop = (lambda token: len(request.tokens) == 4 and request.cancel()) if state == "last token" else None
    request = driver.submit(ids_of(70), last, stop)
    if state == "prefilling":
        driver.step(1)
        assert request.job.read == 24
    elif state == "between chunks":
        driver.step(2)
        assert request.job.read == 48
    elif state in ("decoding", "last token"):
        driver.until(lambda: len(request.tokens) >= 2)
    elif state == "admitted beside":  # the row comes free in the step that finds it cancelled
        driver.until(lambda: others[0].job.state == "finished")
    return neighbour, request, others


@pytest.mark.parametrize("state", ["queued", "prefilling", "between chunks", "decoding", "last token", "admitted beside"])
def test_cancel_gives_memory_back_and_leaves_neighbours_alone(driver, alone, state):
    neighbour, request, others = in_state(driver, state)
    before = driver.slots.row_memory(int(driver.slots.committed[neighbour.job.row]))
    if state == "last token":
        driver.step(2)
        assert request.state == "finished" and len(request.result(0).token_ids) == 4  # it had ended when it was seen
    else:
        request.cancel()
        driver.step()
        done = request.result(0)
        assert done.finish_reason == request.state == "cancelled" and done.token_ids == request.tokens
        assert done.prompt_tokens == 70 and (len(done.token_ids) >= 2) == (state == "decoding")
    if not others:
        assert driver.slots.memory_bytes == before and driver.slots.limits.astype(bool).sum() == 1
    late = driver.submit(ids_of(20), zz.Sampling(3))
    driver.until(lambda: late.state == "finished")
    driver.drain()
    assert neighbour.result(0).token_ids == alone
    request.cancel()  # of one that has ended: nothing
    driver.step()
    assert driver.scheduler.ended["finished"] + driver.scheduler.ended["cancelled"] > 0


def test_a_prompt_is_admitted_before_its_first_chunk_and_may_be_cancelled_then(driver):
    first, second = (driver.submit(ids_of(length), zz.Sampling(2)) for length in (20, 90))
    driver.step()
    assert (first.state, second.state, second.job.read) == ("decoding", "prefilling", 0)
    second.cancel()
    driver.step()
    assert second.state == "cancelled" and first.state == "finished" and driver.slots.memory_bytes == 0


def exact(tokens: int, **options):
    """An engine with memory for one row of `tokens` tokens, to the byte."""
    with driven(new_model("llama"), PLAN) as driver:
        rings, page = driver.slots.ring_bytes, driver.slots.row_memory(tokens)
    return driven(new_model("llama"), PLAN, memory=rings + page, **options)


@pytest.mark.parametrize("prompt", [1, 20, 39])
def test_exactly_the_capacity_works_and_one_more_is_refused(prompt):
    """A page of 4 KiB holds 8 tokens here, so that 40 are whole pages."""
    with exact(40) as driver:
        pool = driver.scheduler.pool
        assert pool.most == 40 and driver.engine.capacity(prompt, 40 - prompt) == 1
        request = driver.submit(ids_of(prompt), zz.Sampling(40 - prompt))
        if prompt < 39:
            driver.until(lambda: len(request.tokens) == 39 - prompt)
            assert driver.slots.memory_bytes == pool.budget
        driver.drain()
        assert len(request.result(0).token_ids) == 40 - prompt
        with pytest.raises(zz.RequestTooLarge, match=rf"{prompt} tokens and max_tokens={41 - prompt} .* at most 40") as caught:
            driver.submit(ids_of(prompt), zz.Sampling(41 - prompt))
        assert caught.value.fits == 40 and driver.engine.capacity(prompt, 41 - prompt) == 0
        again = driver.submit(ids_of(prompt), zz.Sampling(40 - prompt))  # nothing was scheduled, and the engine goes on
        again_too = driver.submit(ids_of(30), zz.Sampling(10))
        driver.step(2)
        again.cancel()
        driver.drain()
        assert len(again_too.result(0).token_ids) == 10


@pytest.mark.parametrize("limit_ms,read", [(1e9, [20, 30, 30]), (1e-6, [0, 0, 20])])
def test_short_prompts_are_read_together_while_nobody_waits_long(limit_ms, read):
    with driven(new_model("llama"), PLAN, max_stall_ms=limit_ms, prefill_chunk=30) as driver:
        requests = [driver.submit(ids_of(length), zz.Sampling(3)) for length in (30, 50, 20)]
        driver.step()
        assert sorted(job.read for job in driver.scheduler.jobs) == read
        driver.drain()
        assert [len(request.result(0).token_ids) for request in requests] == [3, 3, 3]


def test_max_len_is_a_limit_too(driver):
    with pytest.raises(zz.RequestTooLarge, match="401 together, more than max_len=400: give at most 400") as caught:
        driver.submit(ids_of(380), zz.Sampling(21))
    assert caught.value.fits == 400 and not driver.scheduler.busy


@pytest.mark.parametrize("kv_format", ["none", "int8", "int4", {"k": "int8", "v": "int4"}], ids=str)
def test_capacity_is_what_can_run_at_once(kv_format):
    """And the pages that rows take are those that were reckoned with."""
    plan = zz.Plan(PLAN.kinds, sink=4, window=20, kv_format=kv_format)
    with driven(new_model("llama"), plan, max_rows=8) as driver:
        size = driver.slots.row_memory(100)
        memory = driver.slots.ring_bytes + 3 * size + size // 2
    with driven(new_model("llama"), plan, max_rows=8, memory=memory) as driver:
        assert driver.engine.capacity(60, 40) == 3
        requests = [driver.submit(ids_of(60, seed), zz.Sampling(40)) for seed in range(5)]
        driver.until(lambda: any(len(request.tokens) == 39 for request in requests))
        assert sum(request.state == "queued" for request in requests) == 2
        full = requests[0].job.row
        assert driver.slots.committed[full] == 100
        paged = [b._buffer.committed_row_bytes(full) for s in driver.slots.cache.stores for b in s.growing.values()]
        assert sum(paged) == size == driver.slots.row_memory(100)
        driver.drain()
        assert all(len(request.result(0).token_ids) == 40 for request in requests)


class Broken(Exception):
    pass


def once(error: Exception, when=lambda *args: True):
    """A hook that raises once."""
    left = [error]

    def hook(*args):
        if left and when(*args):
            raise left.pop()

    return hook


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("part", ["decode", "prompt"])
def test_a_failing_forward_ends_the_requests_of_its_step_only(driver, alone, part, layer):
    """Within the model, where layers before the failing one have written to their caches and rings."""
    attention = driver.engine.model.model.layers[layer].self_attn
    if part == "decode":
        failing = [driver.submit(ids_of(length), zz.Sampling(40)) for length in (50, 30)]
        driver.until(lambda: all(len(request.tokens) > 2 for request in failing))
        neighbour = driver.submit(*NEIGHBOUR)  # waits for a row
        handle = attention.register_forward_hook(once(Broken("here")))
    else:
        neighbour = driver.submit(*NEIGHBOUR)
        driver.until(lambda: neighbour.state == "decoding")
        failing = [driver.submit(ids_of(60), zz.Sampling(4))]
        driver.until(lambda: driver.scheduler.in_state("prefilling"))
        several = lambda module, args, kwargs, output: kwargs["hidden_states"].shape[1] > 1  # noqa: E731
        handle = attention.register_forward_hook(once(Broken("here"), several), with_kwargs=True)
    try:
        driver.step()
    finally:
        handle.remove()
    for request in failing:
        assert request.state == "failed" and request.job.row is None
        with pytest.raises(Broken, match="here"):
            request.result(0)
    driver.drain()
    assert neighbour.result(0).token_ids == alone


def test_no_memory_for_a_row_ends_its_request_only(driver, alone, monkeypatch):
    """In the last layer, so that others have the memory already."""
    *_, buffer = (buffer for store in driver.slots.cache.stores for buffer in store.growing.values())
    commit_row = buffer.commit_row

    def commit_few(row, slots):
        if slots > 256:
            raise MemoryError("none left")
        commit_row(row, slots)

    monkeypatch.setattr(buffer, "commit_row", commit_few)
    failing, neighbour = driver.submit(ids_of(245), zz.Sampling(60)), driver.submit(*NEIGHBOUR)
    driver.until(lambda: failing.state == "failed")
    assert len(failing.tokens) == 12
    with pytest.raises(MemoryError, match="none left"):
        failing.result(0)
    driver.drain()
    assert neighbour.result(0).token_ids == alone


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_end_their_request_only(driver, alone, value):
    neighbour, other = driver.submit(*NEIGHBOUR), driver.submit(ids_of(40), zz.Sampling(9))
    driver.until(lambda: neighbour.state == other.state == "decoding")

    def spoil(module, args, output):
        output = output.clone()
        output[1, :, 7] = value
        return output

    assert neighbour.job.row < other.job.row
    handle = driver.engine.model.lm_head.register_forward_hook(spoil)
    driver.step()
    handle.remove()
    with pytest.raises(RuntimeError, match="logits that are not finite"):
        other.result(0)
    driver.drain()
    assert neighbour.result(0).token_ids == alone


def test_a_failing_callback_ends_its_request_only(driver, alone):
    neighbour = driver.submit(*NEIGHBOUR)
    failing = driver.submit(ids_of(10), zz.Sampling(9), once(Broken("of the caller"), lambda token: len(failing.tokens) == 3))
    driver.drain()
    with pytest.raises(Broken, match="of the caller"):
        failing.result(0)
    assert len(failing.tokens) == 3 and neighbour.result(0).token_ids == alone


def test_what_is_not_as_noted_is_found(driver):
    request = driver.submit(ids_of(30), zz.Sampling(9))
    driver.step(2)
    row, slots = request.job.row, driver.slots
    for spoil, mend, words in [
        (lambda: slots.cache.stores[0].commit_row(row, 200), None, "memory for"),
        (lambda: slots.state.seq_lens[slots.cache.seq_lens.device].add_(1), -1, "lengths"),
        (lambda: driver.scheduler.pool.reserved.update({5: 1}), 5, "the pool has reserved"),
    ]:
        spoil()
        with pytest.raises(RuntimeError, match=words):
            driver.steps.check()
        if mend is None:
            for store in slots.cache.stores:
                store.commit_row(row, 200) if store.growing else None
            slots.limits[row] = slots.committed[row] = request.job.room = 200
            driver.scheduler.pool.reserved[row] = slots.row_memory(200)
            driver.steps.check()
        elif mend == -1:
            slots.state.seq_lens[slots.cache.seq_lens.device].sub_(1)
        else:
            del driver.scheduler.pool.reserved[mend]
    request.cancel()
    driver.drain()


BAD = {
    "a prompt must be of tokens 0 to 198, got 199": ([5, VOCAB], zz.Sampling(3)),
    "at least one token": ([], zz.Sampling(3)),
    r"got shape \[2, 2\]": (torch.ones(2, 2, dtype=torch.long), zz.Sampling(3)),
    "must be token ids, got float": ([1.0], zz.Sampling(3)),
    "in a list or tensor; got None": (None, zz.Sampling(3)),
    r"in a list or tensor; got \[1, 'a'\]": ([1, "a"], zz.Sampling(3)),
    r"in a list or tensor; got \[1180591620717411303424\]": ([2**70], zz.Sampling(3)),
    "must be a zz.Sampling, got a int": ([1], 3),
    "a string need a tokenizer": ("text", zz.Sampling(3)),
    "stop strings need a tokenizer": ([1], zz.Sampling(3, stop="x")),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_requests_are_named(driver, message):
    with pytest.raises((TypeError, ValueError), match=message):
        driver.submit(*BAD[message])
    assert not driver.scheduler.busy
