"""cache_rows: any subset and order of cache rows equals those rows in a dense batch, and all other rows are left alone."""

from dataclasses import replace

import pytest
import torch
from op_cases import FLOOR, Case, check, relative_error
from quant_cases import PAIRS, call, is_served, quantised, same
from quant_cases import check as check_quantised

from zigzag_ext.attention import ops

LENGTHS = (0, 3, 28, 200, 61)
ORDERS = [(4, 0, 3, 1, 2), (6, -1, 0, 5, -1), (-1, -1, -1, -1, -1), (2, 1, 0, -1, 9)]
NAMES = ("k_cache", "v_cache", "k_scale", "v_scale")


@pytest.mark.parametrize("rows", ORDERS)
@pytest.mark.parametrize("q_len", [1, 2, 16, 17, 64])
@pytest.mark.parametrize("window,slack", [(0, 0), (24, 0), (24, 5), (24, 400)])
def test_rows_are_the_specification(device, dtype, window, slack, q_len, rows):
    pad = (0, 1, 0, q_len, 0)
    check(Case(LENGTHS, q_len, 4, 2, 64, 4, window, pad, slack, rows, spare_slots=20).on(device, dtype))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize("window,slack", [(0, 0), (24, 5)])
def test_rows_of_quantised_caches_are_the_specification(device, window, slack, q_len, pair):
    dtype = torch.float32 if device == "cpu" else torch.float16
    if not is_served(device, pair, window):
        pair = ("int8", "int4") if not window else ("int4", "int4")  # the refusal: test_quantised.py
    check_quantised(Case(LENGTHS, q_len, 4, 2, 64, 4, window, (0, 1, 0, q_len, 0), slack, ORDERS[1]).on(device, dtype), pair)


@pytest.mark.parametrize("pair", [("none", "none"), ("fp8", "fp8"), ("int8", "int8"), ("int4", "int4")], ids="-".join)
@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize("window,slack", [(0, 0), (24, 0), (24, 5)])
@pytest.mark.parametrize("rows", [(4, 0, 3, 1, 2), (3,), (4, 1), (1, -1, 4)])
def test_rows_are_those_of_a_dense_batch(device, window, slack, q_len, pair, rows):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    dense = Case(LENGTHS, q_len, 4, 2, 64, 4, window, None, slack, rotary_dim=32 if q_len <= 16 else 0).on(device, dtype)
    inputs = quantised(dense, pair)
    whole = {name: t if t is None else t.clone() for name, t in inputs.items()}
    want_out, want_lse = call(whole, dense)
    chosen = torch.tensor([max(row, 0) for row in rows], device=device)
    own = {name: inputs[name][chosen] for name in ("q", "k_new", "v_new", "cos", "sin") if name in inputs}
    given = inputs | own | {"cache_rows": torch.tensor(rows, dtype=torch.int32, device=device)}
    given |= {name: inputs[name] if inputs[name] is None else inputs[name].clone() for name in NAMES}
    out, lse = call(given, replace(dense))
    for i, row in enumerate(rows):
        if row < 0:
            assert not out[i].any() and torch.isneginf(lse[i]).all()
            continue
        assert relative_error(out[i].cpu(), want_out[row].cpu().double()) <= 4 * FLOOR[dtype]
        torch.testing.assert_close(lse[i], want_lse[row], atol=2e-3, rtol=1e-4)
    for name in NAMES:
        if inputs[name] is None:
            continue
        for row in range(len(LENGTHS)):
            wanted = whole[name][row] if row in rows else inputs[name][row]
            assert same(given[name][row], wanted.cpu()), (name, row)


@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_append_of_rows(device, dtype, q_len):
    case = Case(LENGTHS, q_len, 4, 2, 64, 4, 24, (0, 1, 0, q_len, 0), 5, ORDERS[1]).on(device, dtype)
    attended, appended = case.build(), case.build()
    call({n: attended.get(n) for n in (*attended, "k_scale", "v_scale")}, case)
    names = ("k_new", "v_new", "k_cache", "v_cache", "seq_lens")
    rows = {"pad": appended["pad"], "cache_rows": appended["cache_rows"]}
    ops.append(*(appended[n] for n in names), **rows, sink=case.sink, window=case.window)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(torch.nan_to_num(attended[name]), torch.nan_to_num(appended[name]))


@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize("window", [0, 24])
def test_rows_and_heads_together(device, dtype, window, q_len):
    """Heads 2 and 0 of three, rows in another order: the call on their tensors alone."""
    case = Case(LENGTHS, q_len, 4, 2, 64, 4, window, (0, 1, 0, q_len, 0), 3, ORDERS[1]).on(device, dtype)
    alone = case.build()
    among = {n: t if t is None else t.clone() for n, t in alone.items()}
    for name, group in (("q", 4), ("k_new", 1), ("v_new", 1)):
        batch, _, tokens, dim = alone[name].shape
        spread = torch.full((batch, 3, group, tokens, dim), torch.nan, dtype=dtype, device=device)
        spread[:, [2, 0]] = alone[name].reshape(batch, 2, group, tokens, dim)
        among[name] = spread.reshape(batch, 3 * group, tokens, dim)
    options = {"sink": case.sink, "window": case.window}
    want_out, want_lse = ops.attention(**alone, **options)
    heads = torch.tensor([2, 0], dtype=torch.int32, device=device)
    out, lse = ops.attention(**among, **options, heads=heads)
    own = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3], device=device)
    assert torch.equal(out[:, own], want_out) and torch.equal(lse[:, own], want_lse)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(torch.nan_to_num(among[name]), torch.nan_to_num(alone[name]))


BAD = {
    r"cache_rows\[1\] is 7": [0, 7],
    r"cache_rows\[0\] is -2": [-2, 0],
    r"cache_rows must have shape \[2\]": [0, 1, 2],
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("function", ["attention", "append"])
def test_bad_rows_are_named_and_nothing_is_written(function, message):
    case = Case((20, 90), 1, cache_rows=(1, 4))
    inputs = case.build() | {"cache_rows": torch.tensor(BAD[message], dtype=torch.int32)}
    before = inputs["k_cache"].clone()
    if function == "append":
        inputs.pop("q")
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, function)(**inputs)
    assert torch.equal(torch.nan_to_num(before), torch.nan_to_num(inputs["k_cache"]))


def test_rows_of_other_types_and_lengths_of_other_sizes(device, dtype):
    inputs = Case((20, 90), 1, cache_rows=(1, 4)).on(device, dtype).build()
    with pytest.raises(RuntimeError, match="cache_rows must be int32"):
        ops.attention(**inputs | {"cache_rows": inputs["cache_rows"].long()})
    with pytest.raises(RuntimeError, match=r"seq_lens must have shape \[7\], got \[2\]"):
        ops.attention(**inputs | {"seq_lens": inputs["seq_lens"][:2]})
    with pytest.raises(RuntimeError, match=r"k_cache must have shape \[2, "):
        ops.attention(**inputs | {"cache_rows": None})


def test_a_number_that_does_not_exist_skips_its_row_on_cuda(device, dtype):
    if device == "cpu":
        return  # refused: above
    inputs = Case((20, 90, 5), 1, cache_rows=(1, 4, 0)).on(device, dtype).build()
    inputs["cache_rows"][1] = 1 << 30
    before = inputs["k_cache"][4].clone()
    out, lse = ops.attention(**inputs)
    assert not out[1].any() and torch.isneginf(lse[1]).all() and out[0].any()
    assert torch.equal(torch.nan_to_num(before), torch.nan_to_num(inputs["k_cache"][4]))
