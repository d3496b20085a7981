"""Prefill = decode = reference: 200 random ways of cutting prompts give the outputs and caches of one shot, then 300 steps agree.

Before every piece, the ring slot that the new tokens have pushed out of the window is overwritten with NaN: nobody may read it.
"""

import random
from dataclasses import dataclass, field

import pytest
import torch

pytest.importorskip("transformers")

from op_cases import relative_error  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

import zigzag_ext as zz  # noqa: E402
from zigzag_ext.attention import reference  # noqa: E402

PROBLEMS, CUTS, STEPS, HEAD_DIM = 10, 20, 300, 64
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}  # relative error of a row of head_dim


@dataclass
class Problem:
    """A plan, a prompt and 300 further tokens as q, k, v per layer, with what one shot and the reference make of them."""

    seed: int
    dtype: torch.dtype
    layers: list = field(default_factory=list)

    def __post_init__(self):
        self.rng = random.Random(self.seed)
        self.sink, self.window = self.rng.choice([(0, 1), (0, 9), (1, 16), (4, 17), (5, 30), (8, 64)])
        self.kinds = self.rng.sample(["retrieval", "streaming", "streaming"], 3)
        self.batch, self.group, self.kv_heads = self.rng.choice([1, 2]), self.rng.choice([1, 3, 4]), self.rng.choice([1, 2])
        self.tokens = self.rng.randint(2 * (self.sink + self.window) + 1, 260)
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.kv_heads * self.group, self.kv_heads, self.kv_heads)
        for _ in self.kinds:
            shapes = [(self.batch, h, self.tokens + STEPS, HEAD_DIM) for h in heads]
            self.layers.append([torch.randn(shape, generator=generator).to(self.dtype) for shape in shapes])
        self.check_one_shot()

    def check_one_shot(self):
        """The reference, in float64, over prompt and steps; one shot must agree with it, and its decode steps too."""
        self.once = self.new_cache()
        self.prompt_outs = self.feed(self.once, 0, self.tokens)
        self.prompt_buffers = [(layer.keys.clone(), layer.values.clone()) for layer in self.once.layers]
        self.step_outs = [self.feed(self.once, position, 1) for position in range(self.tokens, self.tokens + STEPS)]
        for i, (tensors, layer) in enumerate(zip(self.layers, self.once.layers, strict=True)):
            q, k, v = (t.double() for t in tensors)
            none = torch.zeros(self.batch, dtype=torch.int32)
            empty = k[:, :, :0]
            expected, _ = reference.attention(q, k, v, empty, empty, none, sink=layer.sink, window=layer.window)
            ours = torch.cat([self.prompt_outs[i]] + [step[i] for step in self.step_outs], 2)
            assert relative_error(ours, expected) <= TOLERANCE[self.dtype], layer

    def new_cache(self):
        config = LlamaConfig(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=256)
        return zz.ZigzagCache(config, zz.Plan(self.kinds, sink=self.sink, window=self.window), max_len=self.tokens + STEPS)

    def feed(self, cache, start, count):
        """One forward of `count` tokens from position `start` on, all layers; their outputs."""
        with cache.forward(self.batch, count):
            return [
                layer.attend(*(t[:, :, start : start + count] for t in tensors), HEAD_DIM**-0.5)
                for layer, tensors in zip(cache.layers, self.layers, strict=True)
            ]

    def random_cut(self):
        """Lengths of the pieces: single tokens, a few, around the edges of sink and window, longer than the window, anything."""
        ring = self.sink + self.window
        sizes = [
            lambda: 1,
            lambda: self.rng.randint(2, 16),
            lambda: max(1, self.rng.choice([self.sink, self.window, ring]) + self.rng.randint(-1, 1)),
            lambda: self.window + self.rng.randint(1, self.window + 20),
            lambda: self.rng.randint(1, self.tokens),
        ]
        styles, pieces = self.rng.sample(sizes, self.rng.randint(1, len(sizes))), []
        while sum(pieces) < self.tokens:
            pieces.append(min(self.rng.choice(styles)(), self.tokens - sum(pieces)))
        return pieces


def poison(cache, position):
    """NaN into the ring slot of a position, where there is one outside the sink."""
    for layer in cache.layers:
        if layer.window and position >= layer.sink:
            slot = layer.sink + (position - layer.sink) % layer.window
            layer.keys[:, :, slot] = torch.nan
            layer.values[:, :, slot] = torch.nan


def check_cut(problem, pieces, backend):
    cache, held, outs = problem.new_cache(), 0, []
    with zz.prefill_options(backend):
        for piece in pieces:
            if held:
                poison(cache, held - problem.window)  # not visible to the next token, which will take this slot
            outs.append(problem.feed(cache, held, piece))
            held += piece
    for i, once in enumerate(problem.prompt_outs):
        assert relative_error(torch.cat([out[i] for out in outs], 2), once.double()) <= 2 * TOLERANCE[problem.dtype], i
    for layer, (keys, values) in zip(cache.layers, problem.prompt_buffers, strict=True):
        filled = min(held, layer.slots)
        assert torch.equal(layer.keys[:, :, :filled], keys[:, :, :filled])
        assert torch.equal(layer.values[:, :, :filled], values[:, :, :filled])
    for step, expected in enumerate(problem.step_outs):
        poison(cache, held + step - problem.window)
        for ours, wanted in zip(problem.feed(cache, held + step, 1), expected, strict=True):
            assert torch.equal(ours, wanted), f"decode step {step}"


@pytest.mark.parametrize("seed", range(PROBLEMS))
def test_any_cut_gives_the_result_of_one_shot(seed):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # shapes this small lose time on more
    try:
        problem = Problem(seed, torch.bfloat16 if seed % 4 == 3 else torch.float32)
        for number in range(CUTS):
            pieces = problem.random_cut()
            check_cut(problem, pieces, "torch_cpu" if number % 2 else "zigzag")
    finally:
        torch.set_num_threads(threads)


def test_poison_reaches_the_output_of_whoever_reads_it():
    problem = Problem(1, torch.float32)
    for evicted, expected in ((0, False), (1, True)):  # the oldest token, then the oldest that the next query still sees
        cache = problem.new_cache()
        problem.feed(cache, 0, problem.tokens)
        poison(cache, problem.tokens - problem.window + evicted)
        outs = problem.feed(cache, problem.tokens, 20)
        streaming = [out for out, layer in zip(outs, cache.layers, strict=True) if layer.window]
        assert all(bool(out.isnan().any()) == expected for out in streaming)


def test_the_cuts_are_of_every_kind():
    """What the generator promises, over all problems: single tokens, longer than the window, across the sink, across a wrap."""
    seen = set()
    for seed in range(PROBLEMS):
        problem = Problem.__new__(Problem)
        problem.rng, problem.tokens = random.Random(seed), 200
        problem.sink, problem.window = 4, 17
        for _ in range(CUTS):
            start = 0
            for piece in problem.random_cut():
                end = start + piece
                seen |= {"single"} if piece == 1 else set()
                seen |= {"beyond window"} if piece > problem.window else set()
                seen |= {"across sink"} if start < problem.sink < end else set()
                seen |= (
                    {"across wrap"}
                    if (start - problem.sink) // problem.window < (end - problem.sink) // problem.window
                    else set()
                )
                start = end
    assert seen == {"single", "beyond window", "across sink", "across wrap"}
