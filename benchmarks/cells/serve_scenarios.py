"""What serve.py times of a zz.Engine: each scenario yields its name and fields of a ServeRecord."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import zigzag_ext as zz

from ..timing.token_times import Times, all_decode, summary

LEAST_CHUNK = 128  # tokens of a prompt that a step of the engine reads at least
CHUNK = 8192  # where rows only have to be filled: a step each, in which rows before decode
IDLE_STEPS = 64  # of rows that decode before something comes beside them
SHORT, LONG = 1024, 4  # tokens of a short prompt at most; prompts of the usual length in a long one
_WAIT = 0.01  # seconds between looks


@dataclass
class Job:
    """rows: requests at once. prompt: tokens of each. new: tokens that each is to decode."""

    rows: int
    prompt: int
    new: int


class Runs:
    """Requests of random prompts to one engine, with the times of their tokens. The end of its block cancels them."""

    def __init__(self, engine: zz.Engine, seed: int = 0):
        self.engine, self.times, self.requests = engine, [], []
        self.vocab = engine.model.config.get_text_config().vocab_size
        self.generator = torch.Generator().manual_seed(seed)

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *error) -> None:
        for request in self.requests:
            request.cancel()
        for request in self.requests:
            request.result()

    def ids(self, count: int) -> list[int]:
        return torch.randint(0, self.vocab, (count,), generator=self.generator).tolist()

    def send(self, ids: list[int], new: int) -> Times:
        times = Times()
        self.requests.append(self.engine.submit(ids, zz.Sampling(new, ignore_eos=True), times.note))
        self.times.append(times)
        return times

    def wait(self, condition: Callable[[], bool]) -> None:
        """Raises what a request fails with."""
        while not condition():
            for request in self.requests:
                if request.error is not None:
                    request.result()
            time.sleep(_WAIT)

    @property
    def kv_bytes(self) -> int:
        stats = self.engine.stats()
        return stats["kv_bytes"] + stats["ring_bytes"]


def steps_of_prompts(rows: int, prompt: int, chunk: int = LEAST_CHUNK) -> int:
    """Most steps that an engine takes until so many prompts are read, in chunks of at least so many tokens."""
    return rows * (-(-prompt // chunk))


def filled(job: Job) -> int:
    """New tokens that a row of "steady" and "capacity" may come to decode, the first one while all others are read."""
    return job.new + steps_of_prompts(job.rows, job.prompt, CHUNK)


def steady(engine: zz.Engine, job: Job) -> Iterator[tuple[str, dict]]:
    """Steps in which all rows decode: `new` of them, behind prompts that are read."""
    yield "steady", together(engine, job)


def capacity(engine: zz.Engine, job: Job) -> Iterator[tuple[str, dict]]:
    """The same, of as many rows as fit, which `job` says."""
    yield "capacity", together(engine, job) | {"rows": job.rows}


def together(engine: zz.Engine, job: Job) -> dict:
    with Runs(engine) as runs:
        for _ in range(job.rows):
            runs.send(runs.ids(job.prompt), filled(job))
        runs.wait(lambda: all(times.tokens for times in runs.times))
        start = max(times.tokens[0] for times in runs.times)
        runs.wait(lambda: all(sum(at > start for at in times.tokens.copy()) >= job.new for times in runs.times))
        kv_bytes = runs.kv_bytes
    return summary(runs.times, all_decode(runs.times)) | {"kv_bytes": kv_bytes}


def whole(engine: zz.Engine, job: Job) -> Iterator[tuple[str, dict]]:
    """From the first prompt to the last token of rows that all come at once."""
    with Runs(engine) as runs:
        for _ in range(job.rows):
            runs.send(runs.ids(job.prompt), job.new)
        runs.wait(lambda: all(times.tokens for times in runs.times))
        kv_bytes = runs.kv_bytes
        for request in runs.requests:
            request.result()
    yield "whole", summary(runs.times) | {"kv_bytes": kv_bytes}


def stall(engine: zz.Engine, job: Job) -> Iterator[tuple[str, dict]]:
    """A long prompt alone; rows that decode, alone and while it is read; it beside them, and a short one beside all."""
    long, short = LONG * job.prompt, min(SHORT, job.prompt)
    with Runs(engine) as runs:
        runs.send(runs.ids(long), 1)
        runs.requests[0].result()
    yield "stall: long prompt alone", summary(runs.times)
    steps = steps_of_prompts(job.rows, short) + 4 * IDLE_STEPS + 2 * steps_of_prompts(1, long)
    with Runs(engine, 1) as runs:  # other prompts: none is found again
        decoding = [runs.send(runs.ids(short), steps) for _ in range(job.rows)]
        runs.wait(lambda: all(len(times.tokens) > 1 for times in decoding))
        idle = time.perf_counter()
        runs.wait(lambda: all(sum(at > idle for at in times.tokens.copy()) > IDLE_STEPS for times in decoding))
        before, begun = engine.stats()["prompt_tokens"], time.perf_counter()
        beside = runs.send(runs.ids(long), 1)
        runs.wait(lambda: engine.stats()["prompt_tokens"] - before > long // 2 or bool(beside.tokens))
        quick = runs.send(runs.ids(short), 1)
        runs.wait(lambda: bool(beside.tokens and quick.tokens))
    yield "stall: rows alone", summary(decoding, (idle, begun))
    yield "stall: rows beside", summary(decoding, (begun, beside.tokens[0]))
    yield "stall: long prompt beside", summary([beside])
    yield "stall: short prompt beside", summary([quick])


def prefix(engine: zz.Engine, job: Job) -> Iterator[tuple[str, dict]]:
    """A prompt that nothing has read; one that begins with all of it; then rows of such ones at once."""
    tail = min(16, job.prompt // 2)
    beginning = Runs(engine, 0).ids(job.prompt - tail)
    for seed, (name, rows) in enumerate((("read", 1), ("held", 1), ("shared", job.rows)), start=1):
        with Runs(engine, seed) as runs:
            for _ in range(rows):
                runs.send(beginning + runs.ids(tail if name != "read" else 0), job.new)
            runs.wait(lambda runs=runs: all(times.tokens for times in runs.times))
            kv_bytes, done = runs.kv_bytes, [request.result() for request in runs.requests]
        cached = sum(each.cached_tokens for each in done)
        yield f"prefix: {name}", summary(runs.times) | {"kv_bytes": kv_bytes, "cached_tokens": cached}


SCENARIOS = {"steady": steady, "whole": whole, "stall": stall, "capacity": capacity, "prefix": prefix}
