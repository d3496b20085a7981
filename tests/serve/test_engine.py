"""The engine's thread: callers from everywhere, closing in every way, errors that end it, and hundreds of requests in a row."""

import asyncio
import gc
import random
import threading
import time
import weakref

import processes
import pytest
import torch
from driving import ids_of, plan_of
from tiny_models import new_model

import zigzag_ext as zz

PLAN = plan_of()


@pytest.fixture(scope="module")
def model():
    return new_model("llama")


LENGTHS = (1, 5, 30, 70, 100)


@pytest.fixture(scope="module")
def alone(model):
    """The 12 greedy tokens behind prompts of `LENGTHS`, each alone in its engine."""
    with zz.Engine(model, PLAN, max_len=400, max_rows=1) as engine:
        return {length: engine.generate([ids_of(length)], zz.Sampling(12))[0].token_ids for length in LENGTHS}


@pytest.fixture
def engine(model, alone):
    with zz.Engine(model, PLAN, max_len=400, max_rows=4, queue=8, prefill_chunk=64) as engine:
        yield engine


def idle(engine) -> dict:
    stats = engine.stats()
    assert stats["kv_bytes"] == stats["reserved_bytes"] == stats["queued"] == stats["prefilling"] == stats["decoding"] == 0
    return stats


def test_generate_serves_more_prompts_than_may_wait(engine, alone):
    lengths = [1, 30, 70, 5, 100] * 4
    done = engine.generate([ids_of(length) for length in lengths], zz.Sampling(12))
    assert [each.token_ids for each in done] == [alone[length] for length in lengths]
    assert {each.finish_reason for each in done} == {"length"} and done[2].prompt_tokens == 70 and done[0].cached_tokens == 0
    assert idle(engine)["finished"] == 20 and done[0].text is None


def test_prompts_may_be_tensors_and_have_samplings_of_their_own(engine, alone):
    ids = torch.tensor(ids_of(30))
    samplings = [zz.Sampling(12), zz.Sampling(3), zz.Sampling(5, temperature=1.0, seed=4)]
    done = engine.generate([ids, ids[None], ids.tolist()], samplings, progress=True)
    assert [len(each.token_ids) for each in done] == [12, 3, 5] and done[0].token_ids == alone[30] and done[2].seed == 4
    with pytest.raises(ValueError, match="one for each of 3 prompts; got 2"):
        engine.generate([ids] * 3, samplings[:2])
    with pytest.raises(TypeError, match="a list of prompts, got a string"):
        engine.generate("text", zz.Sampling(2))
    assert engine.generate([], zz.Sampling(2)) == []


def test_generate_refuses_one_that_never_fits_before_it_reads_any(engine):
    before = engine.stats()["prompt_tokens"]
    with pytest.raises(zz.RequestTooLarge) as caught:
        engine.generate([ids_of(10), ids_of(399)], zz.Sampling(2))
    assert caught.value.fits == 400 and engine.stats()["prompt_tokens"] == before


def test_seeds_are_drawn_and_told(engine):
    sampling = zz.Sampling(12, temperature=1.0)
    first, second = engine.generate([ids_of(9)] * 2, sampling)
    assert first.seed != second.seed and first.token_ids != second.token_ids
    again = engine.generate([ids_of(9)], zz.Sampling(12, temperature=1.0, seed=first.seed))[0]
    assert again.token_ids == first.token_ids


def test_tokens_that_end_generate_end_a_request(model, alone):
    tokens = alone[30]
    end = next(i for i, token in enumerate(tokens) if i > 1 and token not in tokens[:i])
    model.generation_config.eos_token_id = [tokens[end], 198]
    try:
        with zz.Engine(model, PLAN, max_len=400) as engine:
            stopped, ignored = engine.generate([ids_of(30)] * 2, [zz.Sampling(12), zz.Sampling(12, ignore_eos=True)])
    finally:
        model.generation_config.eos_token_id = None
    assert (stopped.token_ids, stopped.finish_reason) == (tokens[: end + 1], "stop")
    assert (ignored.token_ids, ignored.finish_reason) == (tokens, "length")


def test_on_token_gets_each_token_in_order(engine, alone):
    got = []
    request = engine.submit(ids_of(30), zz.Sampling(12), on_token=lambda token: got.append(token.id))
    assert request.result(60).token_ids == got == alone[30] == request.tokens


def test_many_threads_submit_cancel_and_wait(engine, alone):
    wrong = []

    def caller(number):
        draw = random.Random(number)
        for _ in range(6):
            length = draw.choice(LENGTHS)
            try:
                request = engine.submit(ids_of(length), zz.Sampling(12))
            except zz.QueueFull:
                time.sleep(0.01)
                continue
            if draw.random() < 0.3:
                time.sleep(draw.random() * 0.05)
                request.cancel()
            tokens = request.result(60).token_ids
            if tokens != alone[length][: len(tokens)] or request.state not in ("finished", "cancelled"):
                wrong.append((length, tokens))

    threads = [threading.Thread(target=caller, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_async_for_gives_all_tokens_to_several_readers(engine, alone):
    async def read(request, leave_after=None):
        tokens = []
        async for token in request:
            tokens.append(token.id)
            if len(tokens) == leave_after:
                break
        return tokens

    async def main():
        requests = [engine.submit(ids_of(length), zz.Sampling(12)) for length in (30, 70)]
        some = asyncio.create_task(read(requests[1], leave_after=2))
        both = await asyncio.gather(*map(read, requests))
        late = await read(requests[0])
        return both, late, await some

    (first, second), late, some = asyncio.run(main())
    assert first == late == alone[30] and second == alone[70] and some == second[:2]


def test_async_for_ends_with_a_cancel_and_raises_what_failed(engine):
    async def main():
        request = engine.submit(ids_of(30), zz.Sampling(300))
        tokens = []
        async for token in request:
            tokens.append(token.id)
            if len(tokens) == 3:
                request.cancel()
        assert request.state == "cancelled" and tokens == request.tokens

        def fail(token):
            raise KeyError("of the caller")

        failing = engine.submit(ids_of(30), zz.Sampling(9), on_token=fail)
        with pytest.raises(KeyError, match="of the caller"):
            async for _ in failing:
                pass

    asyncio.run(main())
    deadline = time.monotonic() + 10
    while engine.stats()["reserved_bytes"] and time.monotonic() < deadline:
        time.sleep(0.01)
    idle(engine)


def test_an_event_loop_that_is_gone_stops_nobody(engine, alone):
    request = None

    async def main():
        nonlocal request
        request = engine.submit(ids_of(30), zz.Sampling(12))
        reader = request.__aiter__()
        await reader.__anext__()

    asyncio.run(main())
    assert request.result(60).token_ids == alone[30]


def test_result_waits_as_long_as_it_is_told(engine):
    request = engine.submit(ids_of(30), zz.Sampling(300))
    with pytest.raises(TimeoutError, match="has not ended after 0.01 s"):
        request.result(0.01)
    request.cancel()
    assert request.result(60).finish_reason == "cancelled"


def test_a_full_queue_says_so_at_once(engine):
    long = [engine.submit(ids_of(30), zz.Sampling(300)) for _ in range(4)]
    deadline = time.monotonic() + 30
    while any(request.state == "queued" for request in long) and time.monotonic() < deadline:
        time.sleep(0.005)
    waiting = [engine.submit(ids_of(5), zz.Sampling(2)) for _ in range(8)]
    with pytest.raises(zz.QueueFull, match="8 requests are waiting"):
        engine.submit(ids_of(5), zz.Sampling(2))
    for request in long:
        request.cancel()
    assert all(len(request.result(60).token_ids) == 2 for request in waiting)


def test_what_waits_for_the_engine_is_refused_in_its_thread(engine):
    errors = []

    def on_token(token):
        for call in (request.result, engine.close, lambda: engine.generate([[1]], zz.Sampling(1))):
            with pytest.raises(RuntimeError, match="waits for the engine") as caught:
                call()
            errors.append(caught.value)

    ready = threading.Event()
    request = engine.submit(ids_of(30), zz.Sampling(1), on_token=lambda token: ready.wait(10) and on_token(token))
    ready.set()
    assert request.result(60).finish_reason == "length" and len(errors) == 3


def test_close_waits_for_what_runs_and_takes_nothing_more(model, alone):
    before = set(vars(model))
    engine = zz.Engine(model, PLAN, max_len=400, max_rows=2)
    requests = [engine.submit(ids_of(length), zz.Sampling(12)) for length in (30, 70, 5, 100)]
    engine.close()
    assert [request.result(0).token_ids for request in requests] == [alone[length] for length in (30, 70, 5, 100)]
    with pytest.raises(zz.EngineStopped, match="the engine is closed; make another one"):
        engine.submit(ids_of(5), zz.Sampling(2))
    engine.close()
    assert set(vars(model)) == before and model.config._attn_implementation != "zigzag"
    assert engine.stats()["finished"] == 4 and engine.stats()["ring_bytes"] == 0


def test_a_close_that_is_interrupted_may_be_called_again(model, alone, monkeypatch):
    engine = zz.Engine(model, PLAN, max_len=400, max_rows=2)
    request, join = engine.submit(ids_of(30), zz.Sampling(300)), threading.Thread.join

    def interrupted(thread, *timeout):
        monkeypatch.setattr(threading.Thread, "join", join)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    closing = [threading.Thread(target=engine.close, kwargs={"drain": False}) for _ in range(3)]
    for thread in closing:
        thread.start()
    for thread in closing:
        thread.join(60)
    assert request.state == "cancelled" and not any(thread.is_alive() for thread in closing)
    zz.disable(zz.enable(model))


def test_an_error_of_the_caller_cancels_what_runs(model):
    with pytest.raises(KeyError), zz.Engine(model, PLAN, max_len=400, max_rows=2) as engine:
        requests = [engine.submit(ids_of(30), zz.Sampling(300)) for _ in range(4)]
        raise KeyError
    assert [request.state for request in requests] == ["cancelled"] * 4
    zz.disable(zz.enable(model))


def test_an_engine_that_nobody_holds_gives_model_and_thread_back(model):
    threads = threading.active_count()
    engine = zz.Engine(model, PLAN, max_len=400, max_rows=2)
    engine.generate([ids_of(5)], zz.Sampling(2))
    gone = weakref.ref(engine)
    assert threading.active_count() == threads + 1
    del engine
    gc.collect()
    assert gone() is None and threading.active_count() == threads
    zz.disable(zz.enable(model))


def test_a_model_that_was_disabled_under_an_engine_fails_requests_by_name(model):
    with zz.Engine(model, PLAN, max_len=400, max_rows=2) as engine:
        zz.disable(model)
        with pytest.raises(RuntimeError, match="never called zigzag attention"):
            engine.generate([ids_of(5)], zz.Sampling(2))
    zz.disable(zz.enable(model))


def test_what_cannot_be_given_back_ends_the_engine(model, monkeypatch):
    """As on a GPU whose context is gone."""
    engine = zz.Engine(model, PLAN, max_len=400, max_rows=2, prefix_cache=False)

    def broken(row):
        raise OSError("the device is gone")

    monkeypatch.setattr(engine._steps.slots, "release", broken)
    requests = [engine.submit(ids_of(30), zz.Sampling(n)) for n in (2, 300, 300)]
    for request in requests:
        with pytest.raises(zz.EngineStopped, match="was ended by OSError: the device is gone; make another one") as caught:
            request.result(60)
        assert isinstance(caught.value.__cause__, OSError) and request.state == "failed"
    with pytest.raises(zz.EngineStopped, match="the device is gone"):
        engine.submit(ids_of(5), zz.Sampling(2))
    with pytest.raises(zz.EngineStopped, match="the device is gone"):
        engine.generate([ids_of(5)], zz.Sampling(2))
    engine.close()
    zz.disable(zz.enable(model))


def test_hundreds_of_requests_leave_nothing_behind(model):
    """Random lengths, samplings, cancels and failures: each ends once, all memory comes back, no thread is left."""
    draw, threads, count = random.Random(0), threading.active_count(), 300

    def fail(token):
        raise ArithmeticError

    with zz.Engine(model, PLAN, max_len=200, max_rows=6, queue=count, prefill_chunk=48, memory=900_000) as engine:
        requests = []
        for number in range(count):
            sampling = zz.Sampling(draw.randint(1, 12), temperature=draw.choice([0.0, 1.0]), seed=number)
            on_token = fail if draw.random() < 0.05 else None
            requests.append(engine.submit(ids_of(draw.randint(1, 60), number), sampling, on_token))
            if draw.random() < 0.2:
                draw.choice(requests).cancel()
        ends = []
        for request in requests:
            try:
                ends.append(request.result(120).finish_reason)
            except ArithmeticError:
                ends.append("failed")
        stats = idle(engine)
        assert stats["finished"] + stats["cancelled"] + stats["failed"] == count and stats["failed"] == ends.count("failed") > 3
        assert stats["cancelled"] == ends.count("cancelled") > 10 and ends.count("length") == stats["finished"] > 200
        assert stats["tokens"] == sum(len(request.tokens) for request in requests)
    assert threading.active_count() == threads


def test_a_process_ends_while_requests_run():
    program = """
        import zigzag_ext as zz
        from tiny_models import new_model
        engine = zz.Engine(new_model("llama"), max_len=4000)
        request = engine.submit([1, 2, 3], zz.Sampling(3900))
        while len(request.tokens) < 3:
            pass
        print(request.state)
    """
    assert processes.run(program, timeout=100).splitlines()[-1] == "decoding"
