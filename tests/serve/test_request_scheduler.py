"""The scheduler, its pool and the pace of chunks: plain arithmetic and states, without a model."""

import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zigzag_ext.serve.errors import QueueFull, RequestTooLarge
from zigzag_ext.serve.pace import MAX_CHUNK, MIN_CHUNK, Pace
from zigzag_ext.serve.pool import Pool
from zigzag_ext.serve.scheduler import DECODING, ENDED, PREFILLING, QUEUED, Job, Scheduler

PAGE = 16  # tokens


def paged(tokens: int) -> int:
    return -(-tokens // PAGE) * 100


def scheduler_of(budget=1000, rows=4, max_len=1000, queue=100, **options) -> Scheduler:
    return Scheduler(Pool(budget, rows, max_len, paged), queue, **options)


def run(scheduler: Scheduler, chunk: int = 10) -> list[Job]:
    """A step of an engine, in which each row that decodes ends after max_tokens steps. Returns who decoded."""
    scheduler.admit()
    decoding = scheduler.in_state(DECODING)
    for job in decoding:
        job.done = getattr(job, "done", 1) + 1
    for job in scheduler.prompts()[:1]:
        scheduler.advance(job, min(chunk, job.left))
        scheduler.took_turns([job])
    for each in decoding:
        if each.done >= each.max_tokens:
            scheduler.end(each, "finished")
    scheduler.check()
    return decoding


def test_the_most_tokens_that_fit_are_whole_pages():
    pool = Pool(1000, 4, 1000, paged)
    assert pool.most == 160 and pool.capacity(160) == 1 and pool.capacity(161) == 0 and pool.capacity(33) == 3
    assert pool.capacity(1) == 4  # rows
    assert Pool(10**9, 4, 50, paged).most == 50 and Pool(5, 4, 50, lambda tokens: 0).capacity(50) == 4
    with pytest.raises(
        RequestTooLarge, match="1,000 bytes for keys and values, which 160 tokens fill: give at most 160"
    ) as caught:
        pool.check(100, 61)
    assert caught.value.fits == 160
    with pytest.raises(ValueError, match="99 bytes are left for keys and values, a row of one token takes 100"):
        Pool(99, 1, 10, paged)


def test_rows_that_are_kept_are_free_for_others():
    pool = Pool(1000, 2, 400, paged)
    first, second = pool.take(20), pool.take(30)
    pool.give_back(first, keep=True)
    assert (pool.free_rows, pool.empty_rows, pool.kept) == (1, 0, {first}) and pool.fits(100) and pool.reserved == {second: 200}
    assert pool.take(40, first) == first and not pool.kept and pool.reserved[first] == 300
    pool.give_back(second, keep=True)
    pool.empty(second)
    assert (pool.free_rows, pool.empty_rows, pool.kept) == (1, 1, set()) and pool.take(1) == second
    with pytest.raises(KeyError):
        pool.empty(second)


def test_a_job_takes_the_row_that_is_picked_for_it():
    scheduler = scheduler_of(rows=3)
    jobs = [Job(10, 5) for _ in range(3)]
    for job in jobs:
        scheduler.submit(job)
    assert scheduler.admit(most=1) == jobs[:1]
    scheduler.end(jobs[0], "finished", keep=True)
    assert scheduler.admit(lambda job: (0, 60), most=1) == jobs[1:2] and (jobs[1].row, jobs[1].room) == (0, 60)
    scheduler.check()
    assert scheduler.pool.reserved == {0: paged(60)} and scheduler.admit() == jobs[2:] and jobs[2].row == 1
    scheduler.check()


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 400)), max_size=60))
def test_a_pool_never_gives_more_than_it_has(moves):
    pool, taken = Pool(1000, 5, 400, paged), {}
    for takes, number in moves:
        if takes and pool.fits(number):
            row = pool.take(number)
            assert row == min({*range(5)} - taken.keys())
            taken[row] = paged(number)
        elif takes:
            assert len(taken) == 5 or sum(taken.values()) + paged(number) > 1000
            with pytest.raises(RuntimeError, match="fits beside"):
                pool.take(number)
        elif taken:
            row = sorted(taken)[number % len(taken)]
            pool.give_back(row)
            del taken[row]
            with pytest.raises(KeyError):
                pool.give_back(row)
        assert pool.reserved == taken and pool.reserved_bytes == sum(taken.values()) <= 1000


def test_a_full_queue_is_named_and_takes_again():
    scheduler = scheduler_of(queue=2)
    jobs = [Job(10, 5) for _ in range(2)]
    for job in jobs:
        scheduler.submit(job)
    with pytest.raises(QueueFull, match="2 requests are waiting, which is as many as may"):
        scheduler.submit(Job(1, 1))
    scheduler.end(jobs[0], "cancelled")
    scheduler.submit(Job(1, 1))
    scheduler.admit()
    scheduler.submit(Job(1, 1))


def test_states_go_one_way():
    scheduler, job = scheduler_of(), Job(25, 2)
    scheduler.submit(job)
    seen = [job.state]
    while scheduler.busy:
        run(scheduler)
        seen += [job.state] if job.state != seen[-1] else []
    assert seen == [QUEUED, PREFILLING, DECODING, "finished"] and scheduler.ended == {"finished": 1, "cancelled": 0, "failed": 0}
    with pytest.raises(RuntimeError, match="a finished request cannot become failed"):
        scheduler.end(job, "failed")
    with pytest.raises(RuntimeError, match="read of a finished request"):
        scheduler.advance(job, 1)


def test_smaller_requests_overtake_as_often_as_they_may():
    """Of 10 pages 6 are taken; one of 5 waits, those of 1 overtake it 3 times."""
    scheduler = scheduler_of(rows=100, overtakes=3)
    first, large = Job(90, 6), Job(70, 10)
    scheduler.submit(first)
    scheduler.admit()
    small = [Job(5, 5) for _ in range(6)]
    for job in (large, *small):
        scheduler.submit(job)
    assert scheduler.admit() == small[:3] and large.overtaken == 3
    scheduler.end(small[0], "cancelled")
    assert scheduler.admit() == []  # although it would fit: the large one is next
    scheduler.end(first, "finished")
    assert scheduler.admit() == [large, *small[3:]]


def test_what_waits_behind_a_larger_one_needs_less_than_it():
    scheduler = scheduler_of(rows=100)
    scheduler.submit(Job(90, 6))
    scheduler.admit()
    waiting = [Job(90, 6), Job(60, 20), Job(60, 4), Job(60, 21)]  # 6, 5, 4 and 6 pages, 4 are left
    for job in waiting:
        scheduler.submit(job)
    assert scheduler.admit() == [waiting[2]]


def test_the_prompt_with_the_least_left_goes_first_and_the_others_not_last():
    scheduler = scheduler_of(budget=10**6, rows=50, patience=4)
    long = Job(400, 5)
    scheduler.submit(long)
    run(scheduler)
    turns = []
    for _ in range(30):
        scheduler.submit(Job(10, 1))  # a new short one each step
        before = long.read
        run(scheduler)
        turns.append(long.read > before)
    assert sum(turns) >= 5 and turns[4] and not any(turns[:4])


def test_a_long_prompt_holds_up_no_row_and_a_short_one_overtakes_it():
    scheduler = scheduler_of(budget=10**6, max_len=10_000)
    rows = [Job(10, 60), Job(10, 60)]
    for job in rows:
        scheduler.submit(job)
    for _ in range(3):
        run(scheduler)
    long = Job(900, 5)
    scheduler.submit(long)
    for _ in range(20):
        assert run(scheduler) == rows  # in every step
    short = Job(10, 5)
    scheduler.submit(short)
    run(scheduler)
    assert short.state == DECODING and long.state == PREFILLING and long.read == 200


@given(st.integers(0, 10**6))
def test_every_request_ends_once_and_within_a_bound(seed):
    draw = random.Random(seed)
    scheduler, jobs = scheduler_of(budget=1600, rows=3, overtakes=2, patience=2), []
    for _ in range(15):
        jobs.append(Job(draw.randint(1, 120), draw.randint(2, 30)))
        scheduler.submit(jobs[-1])
        for _ in range(draw.randint(0, 4)):
            run(scheduler)
        if draw.random() < 0.3:
            victim = draw.choice(jobs)
            if victim.state not in ENDED:
                scheduler.end(victim, draw.choice(ENDED))
        assert all(job.overtaken <= 2 and job.waited <= 2 + 3 for job in jobs)
    for _ in range(15 * 45):
        if scheduler.busy:
            run(scheduler)
    assert all(job.state in ENDED for job in jobs) and sum(scheduler.ended.values()) == 15
    assert not scheduler.pool.reserved and scheduler.pool.free_rows == 3


@pytest.mark.parametrize("a, b", [(0.02, 0.0), (0.02, 3e-6), (0.4, 1e-4), (0.001, 0.0)])
def test_chunks_take_as_long_as_they_may(a, b):
    """Milliseconds of a chunk are n * (a + b * (c + n / 2)): found out on the way, for a prompt of 200,000 tokens."""
    pace, read, times, draw = Pace(50.0), 0, [], random.Random(1)
    while read < 200_000:
        count = pace.chunk(200_000 - read, read)
        ms = count * (a + b * (read + count / 2)) * draw.uniform(0.97, 1.03)
        pace.note(count, read, ms)
        times.append((count, ms))
        read += count
    assert all(ms <= 50 * 1.1 or count <= MIN_CHUNK for count, ms in times[1:])
    late = [(count, ms) for count, ms in times[8:-1] if MIN_CHUNK < count < MAX_CHUNK]
    assert all(ms * (count + 64) / count >= 50 * 0.8 for count, ms in late)  # chunks are multiples of 64
    counts = [count for count, _ in times]
    assert all(now <= max(MIN_CHUNK, 2 * max(counts[:i])) for i, now in enumerate(counts) if i)


def test_a_chunk_is_never_empty_and_never_more_than_is_left():
    pace = Pace(1e-6)
    pace.note(128, 0, 1e6)
    assert [pace.chunk(left, 5000) for left in (1, 127, 128, 129)] == [1, 127, 128, 128]


def test_scheduling_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'zigzag_ext/serve/..'); import importlib.util as u\n"
    code += "import zigzag_ext, types; package = types.ModuleType('zigzag_ext.serve'); package.__path__ = ['zigzag_ext/serve']\n"
    code += "sys.modules['zigzag_ext.serve'] = package; from zigzag_ext.serve import scheduler, pool, pace, text"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
