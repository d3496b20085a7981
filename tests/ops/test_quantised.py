"""Attention and append over quantised caches: codes bit for bit, outputs within rounding, every layout and extreme value."""

import pytest
import torch
from op_cases import FLOOR, Case, relative_error
from quant_cases import CUDA_HEAD_DIMS, FORMATS, PAIRS, SAME, call, check, check_call, is_served, quantised, same, specification

from zigzag_ext.attention import ops, reference

RINGS = [(0, 1), (3, 4), (5, 64)]


def ring_lengths(sink, window):
    edges = [0, sink, sink + window, sink + 2 * window, sink + 3 * window + 1]
    return tuple(sorted({max(0, e + d) for e in edges for d in (-1, 0, 1)}))


def vectors_of_every_kind(head_dim=64):
    """[n, head_dim] float32: random at every magnitude, zeros of both signs, outliers, ties, and what is not finite."""
    rng = torch.Generator().manual_seed(0)
    random = torch.randn(4000, head_dim, generator=rng) * 2.0 ** torch.randint(-120, 120, (4000, 1), generator=rng)
    one_hot = torch.eye(head_dim) * 65504
    ties = (torch.arange(head_dim) - head_dim // 2)[None] / torch.tensor([[1.0], [2.0], [4.0], [16.0]])
    tiny = torch.full((4, head_dim), 1.0) * torch.tensor([[2.0**-149], [2.0**-126], [2.0**-81], [2.0**-80]])
    large = torch.randn(4, head_dim, generator=rng).sign() * torch.finfo(torch.float32).max
    bad = torch.randn(3, head_dim, generator=rng)
    bad[0, 5], bad[1, 6], bad[2, 7] = torch.inf, -torch.inf, torch.nan
    zeros = torch.zeros(2, head_dim)
    zeros[1] = -0.0
    small_beside_large = one_hot + torch.randn(head_dim, head_dim, generator=rng) * 1e-3
    return torch.cat([random, one_hot, -one_hot, ties, tiny, large, bad, zeros, small_beside_large])


@pytest.mark.parametrize("kv_format", FORMATS)
def test_codes_are_those_of_the_specification(device, dtype, kv_format):
    x = vectors_of_every_kind().to(dtype)[None, None].to(device)
    tokens = x.shape[2]
    k_cache, k_scale = ops.new_cache(1, 1, tokens, 64, dtype, device, kv_format)
    v_cache, v_scale = ops.new_cache(1, 1, tokens, 64, dtype, device, kv_format)
    lens = torch.zeros(1, dtype=torch.int32, device=device)
    ops.append(x, -x, k_cache, v_cache, lens, k_scale=k_scale, v_scale=v_scale)
    for value, cache, scale in ((x, k_cache, k_scale), (-x, v_cache, v_scale)):
        codes, expected = reference.encode(value.cpu(), cache.dtype)
        assert same(cache, codes)
        assert torch.equal(scale.cpu(), expected) and (scale > 0).all()


@pytest.mark.parametrize("kv_format", FORMATS)
def test_error_of_a_code(kv_format):
    """Half a step: of the scale for integers, of the value (or of the smallest code) for fp8."""
    x = vectors_of_every_kind()
    x = x[x.isfinite().all(-1) & (x.abs().amax(-1) >= 2.0**-80)]
    codes, scale = reference.encode(x, ops.KV_FORMATS[kv_format])
    step = torch.maximum(x.double().abs() / 8, scale.double()[:, None] / 512) if kv_format == "fp8" else scale.double()[:, None]
    assert ((reference.decode(codes, scale) - x.double()).abs() <= step * 0.50001).all()


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("q_len", [1, 3, 40])
def test_formats_of_keys_and_values(device, dtype, q_len, window, pair):
    if not is_served(device, pair, window):
        with pytest.raises(RuntimeError, match="every pair on the CPU"):
            check(Case((0, 7, 90), q_len, sink=4, window=window).on(device, dtype), pair)
        return
    check(Case((0, 7, 90), q_len, sink=4, window=window).on(device, dtype), pair)


@pytest.mark.parametrize("pair", SAME, ids="-".join)
@pytest.mark.parametrize("q_len", [1, 16, 129])
def test_full_cache_lengths(device, dtype, q_len, pair):
    check(Case((0, 1, 15, 16, 17, 63, 64, 65, 1000), q_len).on(device, dtype), pair)


@pytest.mark.parametrize("pair", SAME, ids="-".join)
@pytest.mark.parametrize("q_len", [1, 5, 129])
@pytest.mark.parametrize("sink,window", RINGS)
def test_ring_lengths(device, dtype, sink, window, q_len, pair):
    check(Case(ring_lengths(sink, window), q_len, sink=sink, window=window).on(device, dtype), pair)


@pytest.mark.parametrize("pair", SAME, ids="-".join)
@pytest.mark.parametrize("group", [1, 9])
@pytest.mark.parametrize("head_dim", ops.HEAD_DIMS)
def test_head_dims_and_groups(device, dtype, head_dim, group, pair):
    for window in (0, 24):
        case = Case((0, 33, 200), 2, group=group, head_dim=head_dim, sink=4, window=window).on(device, dtype)
        if is_served(device, pair, window, head_dim):
            check(case, pair)


@pytest.mark.parametrize("pair", SAME, ids="-".join)
@pytest.mark.parametrize("head_dim", sorted({*ops.HEAD_DIMS} - {*CUDA_HEAD_DIMS}))
def test_head_dims_without_cuda_kernels(device, head_dim, pair):
    """Refused by name; int4 rows of 40 bytes (head_dim 80) already for where they start."""
    if device == "cpu":
        return check(Case((5, 20), 1, head_dim=head_dim), pair)
    case = Case((5, 20), 1, head_dim=head_dim).on(device, torch.bfloat16)
    inputs = quantised(case, pair)
    before = {n: inputs[n].cpu().clone() for n in ("k_cache", "v_cache", "k_scale", "v_scale")}
    with pytest.raises(RuntimeError, match="supported: 64, (80|128)|multiple of 16 bytes"):
        call(inputs, case)
    assert all(same(inputs[n], before[n]) for n in before)


@pytest.mark.parametrize("pair", SAME, ids="-".join)
@pytest.mark.parametrize("q_len", [1, 4, 50])
def test_padding(device, dtype, q_len, pair):
    for window in (0, 24):
        padding = (q_len, 0, q_len // 2, 1, q_len - 1)
        check(Case((0, 0, 9, 40, 0), q_len, pad=padding, sink=4, window=window).on(device, dtype), pair)


@pytest.mark.parametrize("pair", SAME, ids="-".join)
def test_long_context_in_splits(device, dtype, pair):
    check(Case((6000, 3), 1, num_kv_heads=1).on(device, dtype), pair)
    check(Case((6000, 3), 3, num_kv_heads=1, sink=64, window=1024).on(device, dtype), pair)


@pytest.mark.parametrize("pair", SAME, ids="-".join)
@pytest.mark.parametrize("magnitude", [2.0**-60, 2.0**-12, 2.0**12])
def test_values_of_every_magnitude(device, dtype, magnitude, pair):
    """The scale of a value enters its weight: neither a tiny nor a large one may lose bits or overflow."""
    case = Case((300,), 1).on(device, torch.bfloat16 if dtype == torch.float16 else dtype)
    inputs = quantised(case, pair)
    inputs["v_new"] *= magnitude
    inputs["v_scale"] *= magnitude * torch.logspace(-3, 3, inputs["v_scale"].shape[-1], base=2, device=device)
    expected, _, _ = specification(inputs, case)
    out, _ = call(inputs, case)
    assert relative_error((out.cpu().double() / magnitude), expected / magnitude) <= 2 * FLOOR[case.dtype]


def with_values(case, pair, values, k=0.0, q=0.0):
    """Inputs of a cache of `values` [tokens, head_dim] of any magnitude and a new token of zeros; keys and queries likewise."""
    inputs = quantised(case, pair)
    for name, vectors in (("k", torch.as_tensor(k).expand_as(values)), ("v", values)):
        codes, scale = reference.encode(vectors.float(), inputs[f"{name}_cache"].dtype)
        inputs[f"{name}_cache"][:, :, : len(values)], inputs[f"{name}_scale"][:, :, : len(values)] = codes, scale
        inputs[f"{name}_new"].zero_()
    inputs["q"].copy_(torch.as_tensor(q).expand_as(inputs["q"]))
    return inputs


@pytest.mark.parametrize("pair", [*SAME, ("int8", "int4")], ids="-".join)
@pytest.mark.parametrize("low,high", [(2.0**-10, 2.0**100), (2.0**-79, 2.0**50), (0.0, 2.0**100), (2.0**-20, 2.0**114)])
def test_values_far_apart(device, low, high, pair):
    """Tokens of equal probability: none may be lost from the denominator because its values are small beside others."""
    case, rng = Case((600,), 1).on(device, torch.bfloat16), torch.Generator().manual_seed(0)
    sizes = torch.tensor([low, high]).repeat(300)[:, None]
    inputs = with_values(case, pair, torch.randn(600, case.head_dim, generator=rng) * sizes)
    check_call(inputs, case)


@pytest.mark.parametrize("pair", [*SAME, ("int8", "int4")], ids="-".join)
def test_values_further_apart_than_any_kernel_weighs(device, pair):
    """2^199 in between: a GPU leaves the small ones out, but what comes out is finite and no larger than the values."""
    case, rng = Case((600,), 1).on(device, torch.bfloat16), torch.Generator().manual_seed(0)
    sizes = torch.tensor([2.0**-79, 2.0**120]).repeat(300)[:, None]
    values = torch.randn(600, case.head_dim, generator=rng) * sizes
    out, lse = call(with_values(case, pair, values), case)
    assert out.isfinite().all() and lse.isfinite().all() and out.abs().max().cpu() <= values.abs().max()


@pytest.mark.parametrize("pair", [*SAME, ("int8", "int4")], ids="-".join)
def test_many_small_weights_add_up(device, dtype, pair):
    """One key has 2^27 times the probability of each of 30,000 others: too little for float16, but together not nothing."""
    case, others = Case((30001,), 1, group=2, num_kv_heads=1).on(device, dtype), 30000
    k, values = torch.zeros(others + 1, case.head_dim), torch.zeros(others + 1, case.head_dim)
    k[7, 0], values[7, 0] = 27 * 0.6931471805599453 * case.head_dim**0.5, 1.0
    values[:7, 1], values[8:, 1] = 1.0, 1.0
    inputs = with_values(case, pair, values, k, torch.eye(case.head_dim)[0])
    expected, _, _ = specification(inputs, case)
    out = call(inputs, case)[0].cpu()
    torch.testing.assert_close(out[..., :2].double(), expected[..., :2], rtol=2 * FLOOR[dtype] + 1e-4, atol=0)


@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("pair", [*SAME, ("int8", "int4")], ids="-".join)
def test_any_chunking_equals_one_shot(device, dtype, pair, window):
    """New tokens are attended as their codes, so a chunk border changes neither codes nor outputs."""
    if not is_served(device, pair, window):
        pytest.skip("no CUDA kernel for this pair in a ring")
    total, case = 100, Case((0, 0), 100, sink=3, window=window, spare_slots=0).on(device, dtype)
    once, pieces = quantised(case, pair), quantised(case, pair)
    expected, _ = call(once, case)
    rng, done, outs = torch.Generator().manual_seed(1), 0, []
    while done < total:
        step = min(total - done, int(torch.randint(1, 30, (1,), generator=rng)))
        cut = {n: pieces[n][:, :, done : done + step] for n in ("q", "k_new", "v_new")}
        lens = torch.full((2,), done, dtype=torch.int32, device=device)
        outs.append(call(pieces | cut | {"seq_lens": lens}, case)[0])
        done += step
    assert relative_error(torch.cat(outs, 2).cpu(), expected.cpu().double()) <= 4 * FLOOR[dtype]
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        assert same(once[name], pieces[name].cpu())


@pytest.mark.parametrize("pair", SAME, ids="-".join)
def test_what_is_not_a_number_stays_visible(device, dtype, pair):
    case = Case((20,), 1).on(device, dtype)
    for name in ("k_new", "v_new"):
        inputs = quantised(case, pair)
        inputs[name][0, 0, 0, 3] = torch.inf
        out, _ = call(inputs, case)
        assert out[0, : case.group].isnan().all() and out[0, case.group :].isfinite().all()


@pytest.mark.parametrize("pair", SAME, ids="-".join)
def test_past_the_capacity_nothing_is_written(device, dtype, pair):
    case = Case((30, 10), 6, spare_slots=0).on(device, dtype)
    inputs = quantised(case, pair)
    names = ("k_cache", "v_cache", "k_scale", "v_scale")
    whole = {n: inputs[n].clone() for n in names}
    before = {n: t.cpu().clone() for n, t in whole.items()}
    call(inputs | {n: whole[n][:, :, :-2] for n in names}, case)
    for name in names:
        assert same(whole[name][:, :, -2:], before[name][:, :, -2:])


BAD = {
    "no scale": (lambda i: i.update(k_scale=None), "k_scale is missing"),
    "scale of a plain cache": (lambda i: i.update(v_cache=i["q"][:, :2].repeat(1, 1, 24, 1)), "v_scale belongs to"),
    "scale shape": (lambda i: i.update(k_scale=i["k_scale"][:, :, 1:]), "k_scale must have shape"),
    "scale dtype": (lambda i: i.update(v_scale=i["v_scale"].double()), "v_scale must be float32"),
    "int4 width": (lambda i: i.update(k_cache=i["k_cache"].repeat(1, 1, 1, 2)), "k_cache must have shape"),
    "format": (lambda i: i.update(k_cache=i["k_cache"].to(torch.int16)), "quantised one: float8_e4m3fn"),
    "expanded scale": (lambda i: i.update(k_scale=i["k_scale"][:1].expand(2, -1, -1)), "expanded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_raise_and_write_nothing(device, name):
    case = Case((5, 20), 1, spare_slots=3).on(device, torch.bfloat16)
    inputs = quantised(case, ("int4", "int4"))
    before = {n: inputs[n].cpu().clone() for n in ("k_cache", "v_cache", "k_scale", "v_scale")}
    kept = {n: inputs[n] for n in before}
    spoil, message = BAD[name]
    spoil(inputs)
    with pytest.raises(RuntimeError, match=message):
        call(inputs, case)
    assert all(same(kept[n], before[n]) for n in before)


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_opcheck(device, dtype, kv_format, window):
    case = Case((5, 20), 2, sink=2, window=window).on(device, dtype)
    inputs = quantised(case, (kv_format, kv_format))
    for name in ("k_cache", "v_cache"):
        inputs[name].view(torch.uint8).clamp_(max=0x70)
    scales = [torch.nan_to_num(inputs[n]) for n in ("k_scale", "v_scale")]
    inputs_in_order = [inputs[n] for n in ("q", "k_new", "v_new", "k_cache", "v_cache", "seq_lens", "pad")]
    outputs = [t.zero_() for t in ops.new_output(inputs["q"])]
    tail = (None, None, None, None, *outputs, ops.new_workspace(device), case.sink, window, 0.125, *scales)
    # torch's comparisons of schema and compiled results have no float8 arithmetic; the other formats cover both.
    checks = ["test_autograd_registration", "test_faketensor"]
    checks += [] if kv_format == "fp8" else ["test_schema", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(torch.ops.zigzag.attention_, (*inputs_in_order, *tail), test_utils=checks)
    torch.library.opcheck(torch.ops.zigzag.append_, (*inputs_in_order[1:], None, case.sink, window, *scales), test_utils=checks)


def test_unknown_format():
    with pytest.raises(ValueError, match="supported: none, fp8, int8, int4"):
        ops.new_cache(1, 1, 4, 64, torch.bfloat16, "cpu", "int2")
