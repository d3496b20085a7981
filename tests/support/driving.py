"""Engines that tests drive step by step, and what a request gives alone, with how near each of its choices was."""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from tiny_models import prompt

import zigzag_ext as zz

# Of the two best logits, or of a probability from the edge of another token, where rounding may tip the choice: matrix products
# of one and of several rows round differently, and where that moves a key over the border of two codes, its logits move with it.
GAPS = {"none": 1e-4, "int8": 2e-2, "fp8": 5e-2, "int4": 2e-1}
KINDS = ("retrieval", "streaming", "streaming", "retrieval")


def plan_of(kv_format: str = "none", **options) -> zz.Plan:
    return zz.Plan(KINDS, sink=4, window=20, kv_format=kv_format, ring_kv_format=kv_format, **options)


def ids_of(length: int, seed: int | None = None) -> list[int]:
    return prompt(length, seed=length if seed is None else seed)[0].tolist()


class Driver:
    """An engine without its thread: each `step` is one of the engine's, after which all invariants are checked."""

    def __init__(self, engine: zz.Engine):
        self.engine, self.steps, self.slots, self.scheduler = engine, engine._steps, engine._steps.slots, engine._scheduler

    def submit(self, ids, sampling, on_token=None, salt=None):
        request = self.engine._request(ids, sampling, on_token, salt)
        self.scheduler.submit(request.job)
        return request

    @torch.no_grad()
    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.steps.step()
            self.steps.check()
            stats = self.engine.stats()
            assert stats["kv_bytes"] <= stats["reserved_bytes"] <= stats["budget_bytes"] - stats["cached_bytes"]
            assert self.slots.memory_bytes <= stats["kv_bytes"] + stats["cached_bytes"]

    def until(self, condition, most: int = 500) -> None:
        for _ in range(most):
            if condition():
                return
            self.step()
        raise AssertionError("it did not come to that")

    def finish(self) -> None:
        self.until(lambda: not self.scheduler.busy)
        assert not self.scheduler.pool.reserved and self.slots.memory_bytes <= self.engine.stats()["cached_bytes"]

    def drain(self) -> None:
        """`finish`, and what is kept goes."""
        self.finish()
        self.steps.prefixes.clear()
        assert self.slots.memory_bytes == 0 and not self.slots.held.any() and not self.scheduler.pool.reserved


@contextmanager
def driven(model, plan=None, **options):
    """However slow the machine is, a step reads one chunk of one prompt."""
    options = {"max_len": 400, "max_rows": 3, "memory": 1 << 30, "prefix_cache": False, "compile": False} | options
    options = {"max_stall_ms": 1e-6} | options
    with zz.Engine(model, plan, **options) as engine:
        yield Driver(engine)


@dataclass
class Choices:
    """What a request chose: its tokens, and how far each choice was from another one, in logits or as a probability."""

    tokens: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)


def margin(logits, draw, token: int) -> float:
    """Between the two best logits; of a sample the smaller one of its distance from the edges, and of edges of filters."""
    sampling = draw.sampling
    if not sampling.temperature:
        best = logits.topk(2).values
        return float(best[0] - best[1])
    probs, order = (logits.double() / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    nearest = []
    if sampling.top_k:
        nearest.append(float(probs[sampling.top_k - 1] - probs[sampling.top_k]))
        probs[sampling.top_k :] = 0
        probs /= probs.sum()
    if sampling.top_p < 1:
        nearest.append(float((probs.cumsum(0) - sampling.top_p).abs().min()))
        probs[(probs.cumsum(0) - probs >= sampling.top_p)] = 0
    if draw.filters:  # neighbours of nearly equal probability may change places
        at = int((order == token).nonzero()[0])
        nearest += [float((probs[at] - probs[other]).abs()) for other in (at - 1, at + 1) if 0 <= other < len(probs)]
    else:
        probs = torch.zeros_like(probs).scatter(0, order, probs)
    edges = probs.cumsum(0)
    return min([*nearest, float((edges / edges[-1] - draw.uniform).abs().min())])


def near_ties(tokens: list[int], alone: Choices, gap: float) -> int:
    """0 where `tokens` are the first of `alone`, 1 where they differ from a choice on that was within `gap`; else it fails."""
    for place, (token, wanted, distance) in enumerate(zip(tokens, alone.tokens, alone.margins, strict=False)):
        if token != wanted:
            assert distance < gap, f"token {place} is {token}, alone {wanted}, with {distance} between them"
            return 1
    return 0
