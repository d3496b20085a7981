"""A prompt that begins as an earlier one goes on from there, with the tokens of one that is read from its first token on."""

from contextlib import contextmanager

import pytest
import torch
from driving import GAPS, Choices, driven, ids_of, near_ties
from gpu import needs_cuda
from tiny_models import SHARED, new_model, shared_model, windowed_model

import zigzag_ext as zz
from zigzag_ext.serve import prefixes, steps

SINK, WINDOW, PAGE, EVERY = 4, 20, 8, 32  # tokens; a page of 4 KiB holds 8 of them here
TEXT = ids_of(300, 11)
GIVEN, NEW = 70, 5  # tokens of the prompt that others begin with, and of its answer


def plan_of(kinds=("retrieval", "streaming"), **formats) -> zz.Plan:
    return zz.Plan(kinds, sink=SINK, window=WINDOW, **formats)


def model_of() -> torch.nn.Module:
    return new_model("llama", num_hidden_layers=2)


PLAN, RETRIEVAL, MIXED = plan_of(), plan_of(["retrieval"] * 2), plan_of([("streaming", "retrieval"), "streaming"])
SMOOTHED = plan_of(kv_format="int8", key_smoothing=True)


@pytest.fixture(autouse=True)
def marks_are_near(monkeypatch):
    for module in (prefixes, steps):
        monkeypatch.setattr(module, "MARK_EVERY", EVERY)


@contextmanager
def sharing(plan=PLAN, model=None, least=1, **options):
    """A driver that shares beginnings of `least` tokens or more."""
    with driven(model or model_of(), plan, prefix_cache=True, **{"prefill_chunk": 24} | options) as driver:
        driver.steps.prefixes.least = least
        yield driver


def run(driver, ids, new=NEW, **options):
    request = driver.submit(ids, zz.Sampling(new, ignore_eos=True), **options)
    driver.finish()
    return request.result(0)


def cold(driver, watched, ids, new=NEW) -> Choices:
    """What a prompt gives when nothing is kept."""
    driver.steps.prefixes.clear()
    choices = watched(driver, ids, zz.Sampling(new, ignore_eos=True))
    driver.steps.prefixes.clear()
    return choices


def reached(places, common: int, slots: int = SINK + WINDOW) -> int:
    """Tokens that are spared by a row with rings of `slots` slots as of `places`, of `common` tokens."""
    return max(place if place <= common else common if place - common == 1 or place <= slots else 0 for place in places)


BORDERS = [
    *(1, SINK - 1, SINK, SINK + 1),
    *(WINDOW - 1, WINDOW, WINDOW + 1, SINK + WINDOW - 1, SINK + WINDOW, SINK + WINDOW + 1),
    *(EVERY - 2, EVERY - 1, EVERY, EVERY + 1, 2 * EVERY - 2, 2 * EVERY - 1, 2 * EVERY, 2 * EVERY + 1),
    *(3 * PAGE - 1, 5 * PAGE - 1, 5 * PAGE, 5 * PAGE + 1, 48, 2 * (SINK + WINDOW) + 1),  # pages, chunks, the ring's second round
    *(GIVEN - 2, GIVEN - 1, GIVEN, GIVEN + 1, GIVEN + NEW - 3, GIVEN + NEW - 2, GIVEN + NEW - 1, GIVEN + NEW),
]


@pytest.mark.parametrize("rows", [3, 1], ids=["copied", "taken over"])
@pytest.mark.parametrize("kv_format", GAPS)
def test_a_hit_equals_cold_at_every_border(kv_format, rows, watched, record_property):
    """With one row, what is kept is taken over; with several it is copied, unless all of it is used."""
    ties, borders = 0, BORDERS if (kv_format, rows) == ("none", 3) else BORDERS[1::6] + BORDERS[-2:]
    with sharing(plan_of(kv_format=kv_format, ring_kv_format=kv_format), max_rows=rows) as driver:
        first = run(driver, TEXT[:GIVEN])
        whole, places = TEXT[:GIVEN] + first.token_ids, (EVERY, 2 * EVERY, GIVEN, GIVEN + NEW - 1)
        for common in borders:
            ids = whole[:common] + TEXT[100:105]
            wanted = cold(driver, watched, ids)
            assert run(driver, TEXT[:GIVEN]).token_ids == first.token_ids
            done = run(driver, ids)
            assert done.cached_tokens == reached(places, common), common
            ties += near_ties(done.token_ids, wanted, GAPS[kv_format])
        driver.drain()
    record_property("count of hits that differ from cold at a near tie", ties)
    assert ties <= len(borders) // 8


@pytest.mark.parametrize("length", [2, SINK, SINK + WINDOW, SINK + WINDOW + 1, EVERY, 50])
def test_a_prompt_that_comes_again_reads_its_last_token(length, watched):
    with sharing() as driver:
        wanted = cold(driver, watched, TEXT[:length])
        for cached in (0, length - 1, length - 1):
            done = run(driver, TEXT[:length])
            assert done.cached_tokens == cached and not near_ties(done.token_ids, wanted, GAPS["none"])
        driver.drain()


@pytest.mark.parametrize("plan", [RETRIEVAL, MIXED, SMOOTHED], ids=["retrieval", "mixed", "smoothed"])
def test_plans_of_every_kind(plan, watched):
    """Where all layers retrieve, a prompt goes on from any token."""
    gap = GAPS[plan.kv_format.k]
    with sharing(plan) as driver:
        whole = TEXT[:GIVEN] + run(driver, TEXT[:GIVEN]).token_ids
        for common in (23, 55, GIVEN, GIVEN + NEW - 1):
            ids = whole[:common] + TEXT[100:130]
            wanted = cold(driver, watched, ids)
            run(driver, TEXT[:GIVEN])
            done = run(driver, ids)
            assert done.cached_tokens == (common if plan is RETRIEVAL else reached((EVERY, 64, GIVEN, GIVEN + NEW - 1), common))
            near_ties(done.token_ids, wanted, gap)
        driver.drain()


KINDS = {
    "positions of its own": (new_model, "gpt2", {}),
    "windows and soft caps": (windowed_model, "gemma2", {"window": 16}),
    "learned sinks": (windowed_model, "gpt_oss", {"window": 16}),
    **{f"shared caches of {family}": (shared_model, family, {"window": 16}) for family in SHARED},
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_kind(kind, watched):
    """As they are: rings are those of their own windows."""
    make, family, options = KINDS[kind]
    with sharing(None, make(family, **options)) as driver:
        whole = TEXT[:GIVEN] + run(driver, TEXT[:GIVEN]).token_ids
        for common in (40, GIVEN, GIVEN + NEW - 1):
            ids = whole[:common] + TEXT[100:120]
            wanted = cold(driver, watched, ids)
            run(driver, TEXT[:GIVEN])
            done = run(driver, ids)
            rings = driver.slots.ring_bytes > 0
            assert done.cached_tokens == (reached((EVERY, 64, GIVEN, GIVEN + NEW - 1), common, 16) if rings else common)
            assert not near_ties(done.token_ids, wanted, GAPS["none"])
        driver.drain()


def test_smoothed_keys_are_shared_where_their_offset_is_the_same():
    """It is the mean of the first tokens of a prompt, 24 in a chunk here: those of shorter prompts are others."""
    with sharing(SMOOTHED) as driver:
        run(driver, TEXT[:23])
        assert run(driver, TEXT[:60]).cached_tokens == 0  # a short one gives nothing
        assert run(driver, TEXT[:22]).cached_tokens == 0  # and takes nothing
        assert run(driver, TEXT[:70]).cached_tokens == 60
        driver.drain()


@pytest.mark.parametrize("state", ["between chunks", "decoding", "cancelled while it was read", "cancelled while it answered"])
def test_requests_that_run_and_that_were_cancelled_give_what_they_have(state, watched):
    with sharing() as driver:
        ids = TEXT[:80] + TEXT[200:210]
        wanted = cold(driver, watched, ids)
        giver = driver.submit(TEXT[:150], zz.Sampling(20, ignore_eos=True))
        if "answer" in state or state == "decoding":
            driver.until(lambda: len(giver.tokens) == 3)
        else:
            driver.until(lambda: giver.job.read == 56)
        if "cancelled" in state:
            giver.cancel()
            driver.step()
            assert giver.state == "cancelled"
        done = run(driver, ids)
        assert done.cached_tokens == (56 if state in ("between chunks", "cancelled while it was read") else 2 * EVERY)
        assert not near_ties(done.token_ids, wanted, GAPS["none"])
        driver.drain()


def test_a_row_that_was_copied_may_end_at_once(watched):
    """The one that gives is cancelled in the step in which another has taken its beginning, and the other way round."""
    for number in (0, 1):
        with sharing() as driver:
            ids = [TEXT[:150], TEXT[:80] + TEXT[200:210]]
            wanted = [cold(driver, watched, each, 20) for each in ids]
            requests = [driver.submit(ids[0], zz.Sampling(20, ignore_eos=True))]
            driver.until(lambda: len(requests[0].tokens) == 3)  # noqa: B023
            requests.append(driver.submit(ids[1], zz.Sampling(20, ignore_eos=True)))
            driver.until(lambda: requests[1].job.read)  # noqa: B023
            assert requests[1].cached_tokens == 2 * EVERY and requests[1].state == "prefilling"
            requests[number].cancel()
            driver.step()
            assert requests[number].state == "cancelled"
            driver.finish()
            assert not near_ties(requests[1 - number].result(0).token_ids, wanted[1 - number], GAPS["none"])
            driver.drain()


def test_requests_that_come_together_read_what_they_share_once(watched):
    prompts = [TEXT[:200] + TEXT[210 + i : 220 + i] for i in range(3)]
    with sharing(least=prefixes.LEAST) as driver:
        wanted = [cold(driver, watched, ids) for ids in prompts]
        before = driver.engine.stats()
        requests = [driver.submit(ids, zz.Sampling(NEW, ignore_eos=True)) for ids in prompts]
        driver.finish()
        stats = driver.engine.stats()
        read, cached = (stats[name] - before[name] for name in ("prompt_tokens", "cached_tokens"))
        assert read + cached == 630 and read < 1.4 * 210 and cached == sum(each.result(0).cached_tokens for each in requests)
        for request, choices in zip(requests, wanted, strict=True):
            assert not near_ties(request.result(0).token_ids, choices, GAPS["none"])
        driver.drain()


def test_the_place_where_two_prompts_part_serves_the_third(watched, monkeypatch):
    """As that behind the instructions with which a service begins all of its prompts."""
    monkeypatch.setattr(prefixes, "BRANCH", 10)
    prompts = [TEXT[:45] + TEXT[100 + 20 * i : 110 + 20 * i] for i in range(4)]
    with sharing() as driver:
        wanted = [cold(driver, watched, ids) for ids in prompts]
        done = [run(driver, ids) for ids in prompts]
        assert [each.cached_tokens for each in done] == [0, EVERY, 45, 45]
        assert not any(near_ties(each.token_ids, choices, GAPS["none"]) for each, choices in zip(done, wanted, strict=True))
        driver.drain()
    monkeypatch.setattr(prefixes, "BRANCH", 14)
    with sharing() as driver:
        assert [run(driver, ids).cached_tokens for ids in prompts] == [0, EVERY, EVERY, EVERY]
        driver.drain()


def test_nothing_is_shared_across_salts_weights_and_adapters():
    model = model_of()
    with sharing(model=model) as driver:
        run(driver, TEXT[:GIVEN])
        assert run(driver, TEXT[:GIVEN], salt="a").cached_tokens == 0
        assert run(driver, TEXT[:GIVEN], salt="a").cached_tokens == GIVEN - 1
        assert run(driver, TEXT[:GIVEN]).cached_tokens == GIVEN - 1
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        assert run(driver, TEXT[:GIVEN]).cached_tokens == 0
        assert run(driver, TEXT[:GIVEN]).cached_tokens == GIVEN - 1
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        assert run(driver, TEXT[:GIVEN]).cached_tokens == 0
        with pytest.raises(TypeError, match="salt must be a string or None, got 5"):
            driver.submit(TEXT[:5], zz.Sampling(1), salt=5)
        driver.drain()


def test_nothing_is_shared_across_adapters():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model_of(), lora).eval()
    model.add_adapter("other", lora)
    with sharing(model=model) as driver:
        for switch in (lambda: None, lambda: model.set_adapter("other"), model.merge_adapter, model.unmerge_adapter):
            switch()
            assert [run(driver, TEXT[:GIVEN]).cached_tokens for _ in range(2)] == [0, GIVEN - 1]
        with model.disable_adapter():
            assert run(driver, TEXT[:GIVEN]).cached_tokens == 0
        driver.drain()


def room_for(tokens: int, rows: int, marks: int = 0) -> int:
    """Bytes of `memory` for so many rows of so many tokens each, and for copies of rings."""
    with driven(model_of(), PLAN, max_rows=4) as driver:
        slots = driver.slots
        return slots.ring_bytes + rows * slots.row_memory(tokens) + marks * slots.ring_row_bytes


def kept(driver) -> list[list[int]]:
    """The first token of each row that has ended, the least recently used first."""
    return [int(held.ids[0]) for held in driver.steps.prefixes.rows.values() if held.ended]


def test_the_least_recently_used_goes_when_pages_are_needed():
    texts = [ids_of(72, seed) for seed in range(4)]
    with sharing(max_rows=4, memory=room_for(80, 3, marks=9)) as driver:
        for ids in texts[:3]:
            run(driver, ids)
        assert kept(driver) == [ids[0] for ids in texts[:3]]
        assert run(driver, texts[0]).cached_tokens == 71  # is used, and taken over
        assert kept(driver) == [texts[i][0] for i in (1, 2, 0)]
        run(driver, texts[3])
        assert kept(driver) == [texts[i][0] for i in (2, 0, 3)]
        assert run(driver, texts[1]).cached_tokens == 0
        driver.drain()


def test_what_is_kept_is_in_nobodys_way(watched):
    """As many requests run at once as without it, at exactly the capacity, and no more memory is taken than there is."""
    with sharing(max_rows=4, memory=room_for(80, 2)) as driver:
        assert driver.engine.capacity(72, 8) == 2
        wanted = cold(driver, watched, TEXT[:72])
        run(driver, TEXT[:72])
        assert driver.engine.capacity(72, 8) == 2
        pair = [driver.submit(ids_of(72, seed), zz.Sampling(8, ignore_eos=True)) for seed in (5, 6)]
        driver.step()
        assert [request.state for request in pair] == ["prefilling"] * 2
        assert not driver.engine.stats()["cached_bytes"] and driver.slots.memory_bytes == driver.engine.stats()["kv_bytes"]
        driver.finish()
        assert len(kept(driver)) == 2 and not driver.steps.prefixes.rows[pair[1].job.row or kept_row(driver)].marks
        done = run(driver, TEXT[:72])
        assert done.cached_tokens == 0 and done.token_ids == wanted.tokens
        driver.drain()


def test_a_row_is_copied_where_much_of_it_would_be_lost():
    with sharing(max_rows=4) as driver:
        run(driver, TEXT[:100], new=6)
        assert run(driver, TEXT[:100], new=3).cached_tokens == 99 and len(kept(driver)) == 2  # 6 of 105 tokens would be lost
        driver.steps.prefixes.clear()
        run(driver, TEXT[:100], new=4)
        assert run(driver, TEXT[:100], new=3).cached_tokens == 99 and len(kept(driver)) == 1  # 4 of 103
        driver.drain()


def kept_row(driver) -> int:
    return next(iter(driver.steps.prefixes.rows))


def test_one_row_that_fills_the_memory_goes_on_turn_by_turn(watched):
    """There is no room beside it for a copy of anything."""
    with sharing(max_rows=4, memory=room_for(120, 1)) as driver:
        ids, turns = TEXT[:50], []
        for turn in range(3):
            done = run(driver, ids)
            turns.append((ids, done))
            assert done.cached_tokens == (0 if turn == 0 else len(turns[-2][0]) + NEW - 1)
            ids = ids + done.token_ids + TEXT[100 + turn : 110 + turn]
        driver.drain()
        for ids, done in turns:
            assert not near_ties(done.token_ids, cold(driver, watched, ids), GAPS["none"])


def test_a_long_row_that_a_short_request_takes_over_keeps_its_memory_reserved():
    """There is no room beside it, and what its tail has is given back with the row."""
    with sharing(max_rows=4, memory=room_for(300, 1, marks=9)) as driver:
        run(driver, TEXT[:280])
        short = driver.submit(TEXT[:65], zz.Sampling(3))
        driver.step()
        assert short.cached_tokens == 64 and short.job.room == driver.slots.committed[short.job.row] > 280
        driver.finish()
        assert driver.slots.held[kept_row(driver)] == 67
        driver.drain()


def test_marks_go_before_a_request_has_to_wait():
    with sharing(max_rows=4, memory=room_for(144, 1, marks=3) + room_for(40, 1) - room_for(0, 0)) as driver:
        giver = driver.submit(TEXT[:130], zz.Sampling(14, ignore_eos=True))
        driver.until(lambda: giver.state == "decoding")
        marks = driver.steps.prefixes.rows[giver.job.row].marks
        assert len(marks) >= 3
        other = driver.submit(ids_of(30), zz.Sampling(10))
        driver.step()
        assert other.state != "queued"
        driver.drain()


def test_a_copy_that_fails_ends_its_request_only(monkeypatch, watched):
    with sharing() as driver:
        wanted = cold(driver, watched, TEXT[:GIVEN], 20)
        giver = driver.submit(TEXT[:GIVEN], zz.Sampling(20, ignore_eos=True))
        driver.until(lambda: giver.state == "decoding")
        *_, buffer = (buffer for store in driver.slots.cache.stores for buffer in store.growing.values())
        with monkeypatch.context() as patch:
            patch.setattr(buffer, "copy_row", lambda *args: 1 / 0)
            failing = driver.submit(TEXT[:GIVEN] + [5], zz.Sampling(3))
            driver.step()
        with pytest.raises(ZeroDivisionError):
            failing.result(0)
        assert run(driver, TEXT[:GIVEN] + [5]).cached_tokens == GIVEN
        driver.finish()
        assert not near_ties(giver.result(0).token_ids, wanted, GAPS["none"])
        driver.drain()


def test_a_mark_that_finds_no_memory_is_left_out(monkeypatch):
    def none_left(row):
        raise torch.OutOfMemoryError

    with sharing() as driver:
        monkeypatch.setattr(driver.slots, "rings_of", none_left)
        run(driver, TEXT[:GIVEN])
        assert run(driver, TEXT[:GIVEN]).cached_tokens == 0
        assert run(driver, TEXT[:GIVEN]).cached_tokens == 0
        driver.drain()


def test_few_tokens_are_read_again():
    with sharing(RETRIEVAL, least=prefixes.LEAST) as driver:
        run(driver, TEXT[:100])
        assert [run(driver, TEXT[:n] + [7]).cached_tokens for n in (15, 16)] == [0, 16]
        driver.drain()


def test_an_engine_tells_what_it_spared_and_gives_all_back():
    with zz.Engine(model_of(), PLAN, max_len=400, max_rows=4) as engine:
        prompts = [TEXT[:40], TEXT[:90], TEXT[:90]]
        for ids in prompts:
            engine.generate([ids], zz.Sampling(NEW))
        stats = engine.stats()
        assert stats["cached_tokens"] == 40 + 89 and stats["prompt_tokens"] + stats["cached_tokens"] == 220
        assert stats["kv_bytes"] == stats["reserved_bytes"] == 0 < stats["cached_bytes"] < stats["budget_bytes"]
    assert engine.stats()["cached_bytes"] == engine._steps.slots.memory_bytes == 0


@needs_cuda
@pytest.mark.parametrize("kv_format", ["none", "int8"])
def test_a_hit_equals_cold_on_a_gpu(kv_format, watched):
    """By device copies of rows and rings, copied and taken over."""
    model = model_of().to("cuda", torch.bfloat16)
    with sharing(plan_of(kv_format=kv_format, ring_kv_format=kv_format), model) as driver:
        whole = TEXT[:GIVEN] + run(driver, TEXT[:GIVEN]).token_ids
        for common in (20, 31, 50, GIVEN - 1, GIVEN, GIVEN + NEW - 1):
            ids = whole[:common] + TEXT[100:105]
            wanted = cold(driver, watched, ids)
            run(driver, TEXT[:GIVEN])
            done = run(driver, ids)
            assert done.cached_tokens >= reached((EVERY, 2 * EVERY, GIVEN), common)
            near_ties(done.token_ids, wanted, 0.25)
        driver.drain()
