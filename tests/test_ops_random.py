"""Random shapes, lengths, strides and paddings against the specification.

ZIGZAG_RANDOM_CASES sets how many (default 240 for each device); a failure prints the case, and its seed repeats it.
"""

import os
import random

import pytest
from op_cases import DTYPES, Case, check

from zigzag_ext import ops

NUM_CASES = int(os.environ.get("ZIGZAG_RANDOM_CASES", "240"))
GROUPS = 24  # tests that share the cases out, so that they run in parallel


def near(rng: random.Random, *edges: int) -> int:
    """One of the edges or up to two off, never negative."""
    return max(0, rng.choice(edges) + rng.randint(-2, 2))


def random_case(rng: random.Random, device: str) -> Case:
    sink, window = rng.choice([0, 1, 4, 16, 64]), rng.choice([0, 0, 0, 1, 2, 7, 16, 64, 100, 256])
    if window:
        edges = [0, sink, window, sink + window, sink + 2 * window, sink + 5 * window + window // 3]
    else:
        edges = [0, 16, 64, 128, 512, rng.randint(0, 3000)]
    batch = rng.choice([1, 1, 2, 3, 5])
    q_len = rng.choice([1, 1, 1, 1, 2, 3, 4, 8, 16, 17, rng.randint(1, 16), rng.randint(17, 150)])
    return Case(
        seq_lens=tuple(near(rng, *edges) for _ in range(batch)),
        q_len=q_len,
        group=rng.randint(1, ops.MAX_GROUP_SIZE),
        num_kv_heads=rng.choice([1, 2, 3, 4, 8]),
        head_dim=rng.choice(ops.HEAD_DIMS),
        sink=sink,
        window=window,
        pad=tuple(rng.choice([0, 0, rng.randint(0, q_len), q_len]) for _ in range(batch)) if rng.random() < 0.3 else None,
        spare_slots=rng.choice([0, 1, 3, 70]),
        strided=rng.random() < 0.3,
        dtype=rng.choice(DTYPES[device]),
        device=device,
    )


@pytest.mark.parametrize("group", range(GROUPS))
def test_random_cases(device, group):
    for seed in range(group, NUM_CASES, GROUPS):
        case = random_case(random.Random(seed), device)
        try:
            check(case, seed)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"seed {seed}, {case}") from error
