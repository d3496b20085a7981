"""What ended requests leave is held in memory that nobody needs, and goes when somebody does."""

import pytest
import torch
from driving import GAPS, driven, ids_of, near_ties
from prefix_cases import GIVEN, NEW, PLAN, RETRIEVAL, TEXT, cold, marks_are_near, model_of, run, sharing  # noqa: F401  the fixture

import zigzag_ext as zz
from zigzag_ext.serve import prefixes


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
