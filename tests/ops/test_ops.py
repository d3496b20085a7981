"""The compiled ops against the specification, at every edge of the cache layouts."""

import pytest
import torch
from op_cases import FLOOR, Case, call, check, relative_error

from zigzag_ext.attention import ops, reference

RINGS = [(0, 1), (0, 5), (1, 1), (3, 4), (4, 16), (5, 64), (0, 100), (64, 256)]
FULL_LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000]
QUERY_LENGTHS = [1, 2, 5, 16, 17, 64, 129]


def ring_lengths(sink, window):
    """Lengths around empty, sink, a full ring and the first and third wrap."""
    edges = [0, sink, window, sink + window, sink + 2 * window, sink + 3 * window + 1]
    return sorted({max(0, e + d) for e in edges for d in (-1, 0, 1)})


@pytest.mark.parametrize("q_len", QUERY_LENGTHS)
def test_full_cache_lengths(device, dtype, q_len):
    check(Case(tuple(FULL_LENGTHS), q_len).on(device, dtype))


@pytest.mark.parametrize("q_len", QUERY_LENGTHS)
@pytest.mark.parametrize("sink,window", RINGS)
def test_ring_lengths(device, dtype, sink, window, q_len):
    check(Case(tuple(ring_lengths(sink, window)), q_len, sink=sink, window=window).on(device, dtype))


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("q_len", [1, 3, 40])
@pytest.mark.parametrize("group", range(1, ops.MAX_GROUP_SIZE + 1))
def test_group_sizes(device, dtype, group, q_len, window):
    check(Case((0, 7, 90), q_len, group=group, sink=4, window=window).on(device, dtype))


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("q_len", [1, 16, 70])
@pytest.mark.parametrize("head_dim", ops.HEAD_DIMS)
def test_head_dims(device, dtype, head_dim, q_len, window):
    check(Case((0, 33, 200), q_len, head_dim=head_dim, sink=4, window=window).on(device, dtype))


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("q_len", [1, 4, 16, 50])
def test_padding(device, dtype, q_len, window):
    lengths = (0, 0, 9, 40, 0)
    check(Case(lengths, q_len, pad=(q_len, 0, q_len // 2, 1, q_len - 1), sink=4, window=window).on(device, dtype))


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("q_len", [1, 8, 50])
def test_strided_views(device, dtype, q_len, window):
    check(Case((3, 100), q_len, sink=4, window=window, strided=True).on(device, dtype))


@pytest.mark.parametrize("q_len", [1, 20])
def test_many_heads_and_rows(device, dtype, q_len):
    check(Case(tuple(range(0, 640, 20)), q_len, num_kv_heads=8, group=2).on(device, dtype))
    check(Case(tuple(range(0, 640, 20)), q_len, num_kv_heads=8, group=2, sink=8, window=120).on(device, dtype))


@pytest.mark.parametrize("q_len", [1, 2, 30])
def test_long_context(device, dtype, q_len):
    check(Case((20_000, 3), q_len, num_kv_heads=1).on(device, dtype))
    check(Case((20_000, 3), q_len, num_kv_heads=1, sink=64, window=4096).on(device, dtype))


def test_no_cache(device, dtype):
    """slots == 0: nothing is cached and nothing appended, the chunk attends itself."""
    for window in (0, 8):
        case = Case((0, 0), 40, sink=2, window=window).on(device, dtype)
        inputs = case.build()
        with_cache, _ = call(inputs, case)
        inputs["k_cache"], inputs["v_cache"] = inputs["k_cache"][:, :, :0], inputs["v_cache"][:, :, :0]
        without_cache, _ = call(inputs, case)
        assert torch.equal(with_cache, without_cache)


@pytest.mark.parametrize("q_len", [1, 6, 40])
def test_past_the_capacity_nothing_else_is_written(device, dtype, q_len):
    case = Case((10, 30), q_len, spare_slots=0).on(device, dtype)
    inputs = case.build()
    wide = {n: inputs[n].clone() for n in ("k_cache", "v_cache")}
    for name in wide:  # the last two tokens of row 1 do not fit; what lies behind the view must stay as it is
        inputs[name] = wide[name][:, :, :-2]
    tails = {n: t[:, :, -2:].clone() for n, t in wide.items()}
    call(inputs, case)
    for name, tail in tails.items():
        assert torch.equal(wide[name][:, :, -2:].isnan(), tail.isnan())


@pytest.mark.parametrize("window", [0, 12])
def test_any_chunking_equals_one_shot(device, dtype, window):
    """Prefill, extension and decode agree: outputs and cache are those of the one-shot call."""
    total = 120
    case = Case((0, 0), total, sink=3, window=window, spare_slots=0).on(device, dtype)
    once, pieces = case.build(), case.build()
    expected, _ = call(once, case)
    rng = torch.Generator().manual_seed(1)
    done, outs = 0, []
    while done < total:
        step = min(total - done, int(torch.randint(1, 30, (1,), generator=rng)))
        chunk = {
            n: t if n.endswith("cache") else t[:, :, done : done + step]
            for n, t in pieces.items()
            if n not in ("seq_lens", "pad")
        }
        chunk |= {"seq_lens": torch.full((2,), done, dtype=torch.int32, device=device), "pad": None}
        outs.append(call(chunk, case)[0])
        done += step
    assert relative_error(torch.cat(outs, 2).cpu(), expected.cpu().double()) <= 4 * FLOOR[dtype]
    for name in ("k_cache", "v_cache"):
        assert torch.equal(torch.nan_to_num(once[name]), torch.nan_to_num(pieces[name]))


@pytest.mark.parametrize("sink,window", RINGS)
@pytest.mark.parametrize("q_len", [1, 3, 300])
def test_append(device, dtype, sink, window, q_len):
    case = Case(tuple(ring_lengths(sink, window)), q_len, sink=sink, window=window).on(device, dtype)
    for layout in (case, Case((0, 5, 64), q_len).on(device, dtype)):
        inputs = layout.build()
        names = ("k_new", "v_new", "k_cache", "v_cache", "seq_lens")
        expected = {n: inputs[n].clone() for n in names}
        reference.append(*(expected[n] for n in names), sink=layout.sink, window=layout.window)
        ops.append(*(inputs[n] for n in names), sink=layout.sink, window=layout.window)
        for name in ("k_cache", "v_cache"):
            assert torch.equal(torch.nan_to_num(inputs[name]), torch.nan_to_num(expected[name]))


def test_ring_after_100_000_positions(device):
    """A ring's memory is constant and its content right after any number of decoded positions."""
    sink, window, steps = 4, 32, 100_000
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    case = Case((0,), 1, group=1, num_kv_heads=1, sink=sink, window=window).on(device, dtype)
    inputs = case.build()
    workspace = ops.new_workspace(device)
    tokens = torch.randn(steps, 2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    num_bytes = inputs["k_cache"].untyped_storage().nbytes()
    for token in tokens:
        out, _ = ops.attention(inputs["q"], token[0], token[1], inputs["k_cache"], inputs["v_cache"], inputs["seq_lens"],
                               sink=sink, window=window, workspace=workspace)  # fmt: skip
        inputs["seq_lens"] += 1
    assert inputs["k_cache"].untyped_storage().nbytes() == num_bytes
    kept = torch.cat([tokens[:sink], tokens[-window:]]).double()
    logits = (inputs["q"].double() * kept[:, 0]).sum(-1).flatten() * 64**-0.5
    expected = logits.softmax(0) @ kept[:, 1].reshape(-1, 64)
    assert relative_error(out.flatten().cpu(), expected.cpu()) <= 2 * FLOOR[dtype]


def test_same_bits_every_time(device, dtype):
    for case in (Case((3000, 5), 1), Case((3000, 5), 4), Case((500, 5), 1, sink=4, window=300), Case((0, 100), 90)):
        case = case.on(device, dtype)
        first = call(case.build(), case)
        for _ in range(3):
            again = call(case.build(), case)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_merge_states(device, dtype):
    rng = torch.Generator().manual_seed(0)
    out_a, out_b = (torch.randn(2, 3, 5, 80, generator=rng).to(dtype).to(device) for _ in range(2))
    lse_a, lse_b = (torch.randn(2, 3, 5, generator=rng).to(device) * 20 for _ in range(2))
    lse_a[0, 0], lse_b[1, 1] = -torch.inf, -torch.inf
    lse_a[1, 1, 0] = -torch.inf  # nothing on either side
    out, lse = ops.merge_states(out_a, lse_a, out_b, lse_b)
    expected_out, expected_lse = reference.merge_states(out_a.cpu().double(), lse_a.cpu(), out_b.cpu().double(), lse_b.cpu())
    torch.testing.assert_close(lse.cpu(), expected_lse, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.cpu().double(), expected_out, atol=2 * FLOOR[dtype], rtol=2 * FLOOR[dtype])
    assert out[1, 1, 0].eq(0).all()


def test_merge_of_two_halves_is_the_whole(device, dtype):
    """Attention over a cache cut in two and merged equals attention over all of it."""
    case = Case((200,), 1, spare_slots=0).on(device, dtype)
    whole = case.build()
    left = {n: t[:, :, :120] if n.endswith("cache") else t for n, t in whole.items()}
    left = {n: None if t is None else t.clone() for n, t in left.items()} | {
        "seq_lens": torch.tensor([119], dtype=torch.int32, device=device)
    }
    left["k_new"], left["v_new"] = whole["k_cache"][:, :, 119:120].clone(), whole["v_cache"][:, :, 119:120].clone()
    right = {n: None if t is None else t.clone() for n, t in whole.items()} | {
        "seq_lens": torch.tensor([80], dtype=torch.int32, device=device)
    }
    right["k_cache"], right["v_cache"] = whole["k_cache"][:, :, 120:].clone(), whole["v_cache"][:, :, 120:].clone()
    merged, lse = ops.merge_states(*call(left, case), *call(right, case))
    expected, expected_lse = call(whole, case)
    assert relative_error(merged.cpu(), expected.cpu().double()) <= 4 * FLOOR[dtype]
    torch.testing.assert_close(lse, expected_lse, atol=1e-3, rtol=1e-4)
