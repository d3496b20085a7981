"""Random shapes, lengths, strides and paddings against the specification, over plain and quantised caches.

ZIGZAG_RANDOM_CASES sets how many for each device and format (default 240, and 72 per quantised format); a failure prints the
case, and its seed repeats it; the last lines say how many ran. 100,000 on a GPU, 20,000 for each of five formats:
ZIGZAG_RANDOM_CASES=20000 python -m pytest -q tests/ops/test_ops_random.py -k cuda -n 16
"""

import math
import os
import random
from dataclasses import replace

import pytest
import torch
from op_cases import DTYPES, Case, check, lengths_after
from quant_cases import CUDA_HEAD_DIMS, SAME, call, check_call, check_close, is_served, quantised, same

from zigzag_ext.attention import ops

NUM_CASES = int(os.environ.get("ZIGZAG_RANDOM_CASES", "240"))
NUM_QUANTISED = int(os.environ.get("ZIGZAG_RANDOM_CASES", "72"))
GROUPS = max(24, NUM_CASES // 250)  # tests that share the cases out, so that they run in parallel


def near(rng: random.Random, *edges: int) -> int:
    """One of the edges or up to two off, never negative."""
    return max(0, rng.choice(edges) + rng.randint(-2, 2))


def random_rows(rng: random.Random, case: Case) -> Case:
    """`case` with slack where it is a ring, and some with cache rows: any of them in any order, some skipped."""
    slack = rng.choice([0, 0, 1, 3, 20, 64, 65, 500]) if case.window else 0
    rows = rng.sample(range(len(case.seq_lens) + 2), len(case.seq_lens))
    rows = [-1 if rng.random() < 0.2 else row for row in rows]
    return replace(case, slack=slack, cache_rows=tuple(rows) if rng.random() < 0.3 else None)


def random_case(rng: random.Random, device: str) -> Case:
    sink, window = rng.choice([0, 1, 4, 16, 64]), rng.choice([0, 0, 0, 1, 2, 7, 16, 64, 100, 256])
    if window:
        edges = [0, sink, window, sink + window, sink + 2 * window, sink + 5 * window + window // 3]
    else:
        edges = [0, 16, 64, 128, 512, rng.randint(0, 3000)]
    batch = rng.choice([1, 1, 2, 3, 5])
    q_len = rng.choice([1, 1, 1, 1, 2, 3, 4, 8, 16, 17, rng.randint(1, 16), rng.randint(17, 150)])
    case = Case(
        seq_lens=tuple(near(rng, *edges) for _ in range(batch)),
        q_len=q_len,
        group=rng.randint(1, ops.MAX_GROUP_SIZE),
        num_kv_heads=rng.choice([1, 2, 3, 4, 8]),
        head_dim=rng.choice(ops.HEAD_DIMS),
        sink=sink,
        window=window,
        pad=tuple(rng.choice([0, -2, rng.randint(0, q_len), q_len, q_len + 3]) for _ in range(batch))
        if rng.random() < 0.3
        else None,
        spare_slots=rng.choice([0, 1, 3, 70]),
        strided=rng.random() < 0.3,
        dtype=rng.choice(DTYPES[device]),
        device=device,
    )
    return random_rows(rng, case)


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_cases(device, group, record_property):
    seeds = range(group, NUM_CASES, GROUPS)
    record_property(f"count of random op cases on {device}", len(seeds))
    for seed in seeds:
        case = random_case(random.Random(seed), device)
        try:
            check(case, seed)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"seed {seed}, {case}") from error


def random_quantised_case(rng: random.Random, device: str, pair: tuple[str, str]) -> Case:
    """Small ones: most of the time goes to the specification."""
    sink, window = rng.choice([0, 1, 4, 16]), rng.choice([0, 0, 0, 1, 2, 7, 16, 33, 64])
    window = window if is_served(device, pair, window) else 0
    if window:
        edges = [0, sink, window, sink + window, sink + 2 * window, sink + 5 * window + window // 3]
    else:
        edges = [0, 16, 48, 64, 128, rng.randint(0, 300), rng.choice([200] * 9 + [2500])]
    batch, q_len = rng.choice([1, 1, 2, 3]), rng.choice([1, 1, 1, 2, 3, 4, 8, 16, 17, rng.randint(1, 16), rng.randint(17, 60)])
    head_dim = rng.choice(ops.HEAD_DIMS if device == "cpu" else CUDA_HEAD_DIMS)
    rope = q_len <= ops.MAX_DECODE_QUERIES and rng.random() < 0.3
    case = Case(
        seq_lens=tuple(near(rng, *edges) for _ in range(batch)),
        q_len=q_len,
        group=rng.choice([1, 2, 3, 4, 7, 8, 16]),
        num_kv_heads=rng.choice([1, 2, 3]),
        head_dim=head_dim,
        sink=sink,
        window=window,
        pad=tuple(rng.choice([0, -2, rng.randint(0, q_len), q_len, q_len + 3]) for _ in range(batch))
        if rng.random() < 0.3
        else None,
        spare_slots=rng.choice([0, 1, 3, 70]),
        strided=rng.random() < 0.3,
        rotary_dim=rng.choice([8, head_dim // 16 * 8, head_dim]) if rope else 0,
        table_dtype=rng.choice([None, torch.float32]),
        shared_table=rng.random() < 0.5,
        dtype=rng.choice(DTYPES[device]),
        device=device,
    )
    return random_rows(rng, case)


def exact_tables(inputs: dict, rng: torch.Generator) -> None:
    """Tables by which float32 and float64 rotate to the same bits, in place: codes can then be compared bit for bit."""
    for name in ("cos", "sin"):
        if inputs.get(name) is not None:
            powers = torch.tensor([-1.0, 0.0, 0.5, 1.0])[torch.randint(4, inputs[name].shape, generator=rng)]
            inputs[name].copy_(powers)


# What is done to keys or values. Factors of float32 and bfloat16, then of float16; "spread" goes from one over it to it.
KINDS = ("usual", "zeros", "all zeros", "constant", "tiny", "huge", "spread", "outlier")
FACTORS = {"zeros": (0.0, 0.0), "tiny": (2.0**-90, 2.0**-14), "huge": (2.0**100, 2.0**14), "spread": (2.0**50, 2.0**12)}


def make_extreme(kind: str, t: torch.Tensor, rng: torch.Generator) -> float:
    """Changes vectors of t [batch, heads, tokens, head_dim] in place; returns the factor by which some have grown."""
    vectors, factor = (*t.shape[:3], 1), FACTORS.get(kind, (1.0, 1.0))[t.dtype == torch.float16]
    chosen = (torch.rand(vectors, generator=rng) < 0.5).to(t.device)
    if kind == "all zeros":
        t.zero_()
    elif kind == "constant":
        t.copy_(torch.where(chosen, t[..., :1].abs(), t))  # of one sign: two that cancel out leave only their rounding
    elif kind == "spread":
        exponents = int(math.log2(factor)) * (2 * torch.rand(vectors, generator=rng) - 1)
        t.mul_((2.0 ** exponents.round()).to(t))
    elif kind == "outlier":
        factor = 2.0 ** int(torch.randint(3, 10, (), generator=rng))
        channel = torch.randint(t.shape[3], vectors, generator=rng).to(t.device)
        hit = chosen & (torch.arange(t.shape[3], device=t.device) == channel)
        t.copy_(torch.where(hit, t * factor, t))
    elif kind != "usual":
        t.copy_(torch.where(chosen, t * factor, t))
    return max(1.0, factor)


def kinds_of(rng: torch.Generator) -> dict[str, str]:
    return {name: KINDS[int(torch.randint(len(KINDS), (), generator=rng))] for name in "kv"}


def extreme_inputs(case: Case, pair: tuple[str, str], seed: int) -> dict:
    """Inputs of which vectors of keys and values are zero, 1e-27, 1e30, of one number, ...; logits stay of usual size."""
    rng = torch.Generator().manual_seed(seed)
    kind = kinds_of(rng)

    def alter(inputs: dict) -> None:
        exact_tables(inputs, rng)
        for name in ("k_new", "v_new", "k_cache", "v_cache"):
            growth, largest = make_extreme(kind[name[0]], inputs[name], rng), torch.finfo(case.dtype).max
            largest /= 2 if name[0] == "k" else 1  # RoPE by these tables may double a key
            inputs[name].clamp_(-largest, largest)  # NaN, what unwritten slots hold, stays
            if name == "k_new":
                inputs["q"].div_(growth)

    return quantised(case, pair, seed, alter)


def in_pieces(inputs: dict, case: Case, rng: random.Random) -> torch.Tensor:
    """The call as several of fewer tokens; returns all their outputs."""
    done, outs, given = 0, [], dict(inputs)
    while done < case.q_len:
        step = rng.randint(1, case.q_len - done)
        cut = {n: inputs[n][:, :, done : done + step] for n in ("q", "k_new", "v_new")}
        cut |= {n: inputs[n][:, done : done + step] for n in ("cos", "sin") if inputs.get(n) is not None}
        given |= cut | {"pad": None if inputs["pad"] is None else inputs["pad"] - done}
        outs.append(call(given, case)[0])
        given["seq_lens"] = lengths_after(given, step)
        done += step
    return torch.cat(outs, 2)


def check_quantised(case: Case, pair: tuple[str, str], seed: int) -> None:
    """The call against the specification, and cut into pieces against itself: the same codes, and outputs within rounding."""
    inputs = extreme_inputs(case, pair, seed)
    names = ("k_cache", "v_cache", "k_scale", "v_scale")
    pieces = inputs | {n: inputs[n].clone() for n in names}
    # In 16 bits the rounding of the output counts, in float32 that of logits, which are as large as 100 here.
    roundings = 16 if case.dtype == torch.float32 else 2
    out, slack = check_call(inputs, case, roundings)
    if case.q_len > 1:
        both = slack and (lambda: 2 * slack())
        check_close(in_pieces(pieces, case, random.Random(seed)).cpu(), out, case.dtype, 2 * roundings, both)
        assert all(same(pieces[n], inputs[n].cpu()) for n in names), "pieces write other codes"


@pytest.mark.parametrize("pair", [*SAME, ("int8", "int4")], ids="-".join)
@pytest.mark.parametrize("group", range(GROUPS))
def test_random_quantised_cases(device, group, pair, record_property):
    seeds = range(group, NUM_QUANTISED, GROUPS)
    record_property(f"count of random op cases on {device}", len(seeds))
    for seed in seeds:
        case = random_quantised_case(random.Random(seed), device, pair)
        try:
            check_quantised(case, pair, seed)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"seed {seed}, {case}") from error


@pytest.mark.parametrize("pair", [*SAME, ("int8", "int4")], ids="-".join)
def test_what_random_quantised_cases_cover(device, pair):
    """Of the cases of a default run: every treatment of keys and values, rings that wrap, also within one call, and pieces."""
    cases = [random_quantised_case(random.Random(seed), device, pair) for seed in range(72)]
    kinds = [kinds_of(torch.Generator().manual_seed(seed)) for seed in range(72)]
    assert all({kind[name] for kind in kinds} == {*KINDS} for name in "kv")
    assert any(max(c.seq_lens) > 2500 for c in cases) and any(c.pad for c in cases) and any(c.rotary_dim for c in cases)
    assert {-1 in c.cache_rows for c in cases if c.cache_rows} == {True, False}
    if is_served(device, pair, 1):
        slack = {(c.slack > 0, c.slack > 64, min(c.q_len, 17)) for c in cases if c.window}
        assert {(False, False, 1), (True, False, 1), (True, True, 1), (True, False, 17)} <= slack
        wrapped = [c for c in cases if c.window and max(c.seq_lens) > c.sink + 2 * c.window]
        assert sum(c.q_len > 1 for c in wrapped) >= 5 and any(1 < c.window < c.q_len for c in wrapped)
