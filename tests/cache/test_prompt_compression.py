"""Which tokens a compressed prompt keeps, against a float64 reference, and attention over what was kept."""

import random

import pytest
import torch

import zigzag_ext as zz
from zigzag_ext.attention import ops
from zigzag_ext.attention.chunk import Chunk
from zigzag_ext.attention.store import LayerStore
from zigzag_ext.cache.compression import METHODS
from zigzag_ext.cache.compression.observed import Observed
from zigzag_ext.cache.compression.select import attention_mass, select
from zigzag_ext.planning.kv_format import parse_kv_format

BATCH, Q_HEADS, KV_HEADS, HEAD_DIM, OBSERVE = 3, 4, 2, 64, 5
LENGTHS = [61, 3, 40]


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference_mass(q, k, lengths, scale):
    """[batch, kv_heads, longest]: the sum over observing queries and grouped heads of their softmax, in float64."""
    mass = torch.zeros(q.shape[0], k.shape[1], max(lengths), dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b, length in enumerate(lengths):
        for head in range(q.shape[1]):
            for i in range(q.shape[2]):
                position = length - q.shape[2] + i
                if position >= 0:
                    logits = k[b, head // group, : position + 1].double() @ q[b, head, i].double() * scale
                    mass[b, head // group, : position + 1] += logits.softmax(0)
    return mass


@pytest.mark.parametrize("block", [7, 16, 1000])
def test_attention_mass_is_that_of_the_last_tokens(block):
    q, k = numbers(BATCH, Q_HEADS, OBSERVE, HEAD_DIM), numbers(BATCH, KV_HEADS, 80, HEAD_DIM, seed=1)
    for b, length in enumerate(LENGTHS):
        k[b, :, length:] = torch.nan  # slots without a token may hold anything
        q[b, :, : max(0, OBSERVE - length)] = torch.nan  # and so may the queries of padding
    observed = Observed.of(q, torch.tensor([max(0, OBSERVE - length) for length in LENGTHS]), 0.3, OBSERVE, None)
    found = attention_mass(observed, lambda start, stop: k[:, :, start:stop], torch.tensor(LENGTHS), max(LENGTHS), block)
    torch.testing.assert_close(found, reference_mass(q, k, LENGTHS, 0.3).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_observed_queries_are_those_of_the_last_tokens(seed):
    """After chunks with padding in front, and after tokens were taken back, as if rows were lists."""
    rng, most, observed = random.Random(seed), 6, None
    rows = [[] for _ in range(BATCH)]
    for number in range(1, 8):
        if number in (4, 6) and observed is not None:
            removed = [rng.randrange(0, min(4, len(row) + 1)) for row in rows]
            observed = observed.without(torch.tensor(removed, dtype=torch.int32))
            known = [max(0, int(n)) for n in observed.valid]
            rows = [row[: len(row) - n][-k:] if k else [] for row, n, k in zip(rows, removed, known, strict=True)]
        q_len = rng.randrange(1, 9)
        pad = [rng.randrange(0, q_len + 1) for _ in rows]
        q = torch.full((BATCH, 1, q_len, 1), torch.nan)
        for b, row in enumerate(rows):
            for column in range(pad[b], q_len):
                q[b, 0, column] = 100 * number + column
                row.append(100.0 * number + column)
        observed = Observed.of(q, torch.tensor(pad, dtype=torch.int32) if any(pad) else None, 1.0, most, observed)
        for b, row in enumerate(rows):
            valid = int(observed.valid[b])
            assert valid == min(most, len(row))
            assert observed.q[b, 0, observed.q.shape[2] - valid :, 0].tolist() == row[len(row) - valid :]


def reference_windows(heads, length, budget, sink, window, observe, score):
    """Tokens that `heads` [n, tokens] keep together by the words of `PromptWindows`, one window after the other."""
    if budget >= length:
        return list(range(length))
    middle = length - sink - observe
    left_over = min(middle % window, budget - sink - observe)
    values = []
    for first in range(sink, sink + middle // window * window, window):
        parts = [sorted(mass[first : first + window].tolist(), reverse=True) for mass in heads]
        parts = [part[: max(1, window // 2)] if score == "max" else part for part in parts]
        values.append((sum(sum(part) / len(part) for part in parts) / len(parts), first))
    best = sorted(sorted(values, reverse=True)[: (budget - sink - observe - left_over) // window], key=lambda pair: pair[1])
    kept = [*range(sink), *(t for _, first in best for t in range(first, first + window))]
    return kept + list(range(length - observe - left_over, length))


@pytest.mark.parametrize("score", ["max", "mean"])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize(("budget", "window", "sink"), [(20, 4, 2), (21, 4, 0), (33, 8, 7), (11, 3, 2), (40, 1, 0)])
def test_windows_are_chosen_by_row_and_head(score, per_head, budget, window, sink):
    method = zz.PromptWindows(budget=budget, window=window, observe=OBSERVE, sink=sink, score=score, per_head=per_head)
    mass = numbers(BATCH, KV_HEADS, max(LENGTHS), seed=2).abs()
    index, kept = select(method, mass, LENGTHS, [budget] * BATCH)
    for b, length in enumerate(LENGTHS):
        assert kept[b] == min(kept[b], budget) or length <= budget
        for head in range(KV_HEADS):
            wanted = reference_windows(mass[b, [head]] if per_head else mass[b], length, budget, sink, window, OBSERVE, score)
            assert index[b, head if per_head else 0, : kept[b]].tolist() == wanted


@pytest.mark.parametrize("name", METHODS)
def test_every_method_spends_its_budget_and_no_more(name):
    method = METHODS[name](budget=24, observe=OBSERVE, sink=2)
    index, kept = select(method, numbers(BATCH, KV_HEADS, max(LENGTHS)).abs(), LENGTHS, [24] * BATCH)
    assert [k == n for k, n in zip(kept, LENGTHS, strict=True)] == [False, True, False]
    for b in (0, 2):
        assert 24 - method.unit < kept[b] <= 24
        for row in index[b, :, : kept[b]]:
            assert row.tolist() == sorted(set(row.tolist())) and row[:2].tolist() == [0, 1]
            assert row[-OBSERVE:].tolist() == list(range(LENGTHS[b] - OBSERVE, LENGTHS[b]))


def test_budgets_fall_over_groups_of_layers_and_their_mean_stays():
    method = zz.PromptWindows(budget=1000, slope=4.0, group=2, sink=0, observe=8)
    budgets = method.budgets(8, 10_000)
    assert budgets == [1750, 1750, 1250, 1250, 750, 750, 250, 250] and sum(budgets) / 8 == 1000
    assert zz.PromptWindows(budget=0.12, sink=4).budgets(3, 10_000) == [1200] * 3
    assert zz.PromptWindows(budget=0.12, sink=4).budgets(1, 10) == [4 + 32 + 8]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0.0}, ValueError, "share of the prompt"),
        ({"budget": 1.5}, ValueError, "share of the prompt"),
        ({"budget": 0}, ValueError, "budget must be at least 1"),
        ({"budget": "much"}, TypeError, "budget"),
        ({"budget": 20, "sink": 4, "observe": 16}, ValueError, "at least sink + observe + 1 = 4 + 16 + 1"),
        ({"budget": 0.5, "window": 0}, ValueError, "window must be at least 1"),
        ({"budget": 0.5, "observe": 0}, ValueError, "observe must be at least 1"),
        ({"budget": 0.5, "score": "median"}, ValueError, "score must be one of max, mean"),
        ({"budget": 0.5, "slope": 0.5}, ValueError, "slope"),
        ({"budget": 0.5, "group": 0}, ValueError, "group"),
        ({"budget": 0.5, "per_head": 1}, TypeError, "per_head"),
    ],
)
def test_what_no_method_can_be_is_refused(options, error, message):
    with pytest.raises(error) as caught:
        zz.PromptWindows(**options)
    assert message in str(caught.value)


@pytest.mark.parametrize("kv_format", ["none", "fp8", "int8", "int4"])
@pytest.mark.parametrize("heads", [None, (1,)], ids=["layer", "head"])
def test_attention_over_what_was_kept_is_masked_attention(kv_format, heads):
    """Bits of kept tokens stay, and later tokens see them, and nothing else, as if the others were masked."""
    tokens, store = 50, LayerStore(kv_format=parse_kv_format("kv_format", kv_format), heads=heads)
    chosen = [*heads] if heads else [*range(KV_HEADS)]
    k, v = numbers(2, KV_HEADS, tokens, HEAD_DIM), numbers(2, KV_HEADS, tokens, HEAD_DIM, seed=1)
    q = numbers(2, Q_HEADS, tokens, HEAD_DIM, seed=2)
    lengths, workspace = torch.zeros(2, dtype=torch.int32), ops.new_workspace("cpu")
    store.allocate(k, 256, None)
    out, _ = ops.new_output(q)
    store.attend(q, k, v, None, Chunk((lengths,), None, workspace), out)
    full = LayerStore(kv_format=store.kv_format, heads=heads)
    full.allocate(k, 256, None)
    full.attend(q, k, v, None, Chunk((lengths,), None, workspace), out)
    mass = numbers(2, len(chosen), tokens, seed=3)
    index = torch.stack([torch.stack([head.topk(20).indices.sort().values for head in row]) for row in mass])
    before = {name: buffer[:, :, :tokens].clone() for name, buffer in store.buffers.items()}
    store.keep_slots(index, tokens)
    for name, buffer in store.buffers.items():
        for b in range(2):
            for head in range(len(chosen)):
                kept = before[name][b, head, index[b, head]]
                assert buffer[b, head, :20].contiguous().view(torch.uint8).equal(kept.contiguous().view(torch.uint8))
    step = [numbers(2, heads_, 1, HEAD_DIM, seed=4 + i) for i, heads_ in enumerate((Q_HEADS, KV_HEADS, KV_HEADS))]
    lengths.fill_(20)
    found, _ = ops.new_output(step[0])
    store.attend(*step, None, Chunk((lengths,), None, workspace), found)
    own = [torch.cat([part, new[:, chosen]], 2) for part, new in zip((full.read(0, tokens)), step[1:], strict=True)]
    group = Q_HEADS // KV_HEADS
    for b in range(2):
        for i, head in enumerate(chosen):
            seen = torch.zeros(tokens + 1, dtype=torch.bool)
            seen[index[b, i]] = seen[-1] = True
            for query in range(head * group, (head + 1) * group):
                logits = (own[0][b, i] @ step[0][b, query, 0] * HEAD_DIM**-0.5).masked_fill(~seen, -torch.inf)
                expected = logits.softmax(0) @ own[1][b, i]
                tolerance = 1e-5 if kv_format == "none" else 0.15  # the new token is attended as its codes
                torch.testing.assert_close(found[b, query, 0], expected, atol=tolerance, rtol=1e-4)
