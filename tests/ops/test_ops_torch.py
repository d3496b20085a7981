"""The ops as torch operators: schema, fake kernels, compilation, graph capture, error messages."""

import inspect

import pytest
import torch
from gpu import launched_kernels, needs_cuda
from op_cases import Case, call, specification

from zigzag_ext.attention import ops, reference


def arguments(case):
    inputs = case.build()
    workspace = ops.new_workspace(case.device)
    names = ("q", "k_new", "v_new", "k_cache", "v_cache", "seq_lens", "pad", "cos", "sin", "heads", "cache_rows")
    outputs = [t.zero_() for t in ops.new_output(inputs["q"])]
    return (*(inputs.get(n) for n in names), *outputs, workspace, case.sink, case.window, 0.125)


@pytest.mark.parametrize("name", ["attention", "append", "merge_states"])
def test_the_specification_takes_the_same_arguments(name):
    """In the same order and with the same defaults; the torch operator has their names, each once."""
    ours, specified = (inspect.signature(getattr(module, name)) for module in (ops, reference))
    assert list(ours.parameters.values()) == list(specified.parameters.values())
    operator = getattr(torch.ops.zigzag, name if name == "merge_states" else f"{name}_").default
    taken = [argument.name for argument in operator._schema.arguments]
    assert sorted(taken) == sorted(ours.parameters)
    positional = [n for n, p in ours.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert taken[: len(positional)] == positional


def clean(case):
    """Arguments without NaN in unused slots, which opcheck's comparisons do not expect."""
    return tuple(torch.nan_to_num(a) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments(case))


@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("q_len", [1, 30])
def test_opcheck_attention(device, dtype, q_len, window):
    torch.library.opcheck(torch.ops.zigzag.attention_, clean(Case((5, 20), q_len, sink=2, window=window).on(device, dtype)))


@pytest.mark.parametrize("window", [0, 8])
def test_opcheck_attention_with_rope(device, dtype, window):
    case = Case((5, 20), 2, sink=2, window=window, rotary_dim=32, table_dtype=torch.float32)
    torch.library.opcheck(torch.ops.zigzag.attention_, clean(case.on(device, dtype)))


@pytest.mark.parametrize("window", [0, 8])
def test_opcheck_append(device, dtype, window):
    args = clean(Case((5, 20), 3, sink=2, window=window, pad=(1, 0)).on(device, dtype))
    torch.library.opcheck(torch.ops.zigzag.append_, (*args[1:7], None, 2, window))


def test_opcheck_merge_states(device, dtype):
    out, lse = torch.randn(2, 4, 3, 64, dtype=dtype, device=device), torch.randn(2, 4, 3, device=device)
    torch.library.opcheck(torch.ops.zigzag.merge_states, (out, lse, out + 1, lse - 1))


def test_autograd_is_refused(device, dtype):
    case = Case((5,), 1).on(device, dtype)
    inputs = case.build()
    inputs["q"].requires_grad_()
    with pytest.raises(RuntimeError, match="no backward"):
        call(inputs, case)
    with torch.no_grad():
        call(inputs, case)


BAD = {
    "head_dim": (
        lambda i: i.update({n: i[n][..., :48].contiguous() for n in ("q", "k_new", "v_new", "k_cache", "v_cache")}),
        "head_dim 48",
    ),
    "q not 4-D": (lambda i: i.update(q=i["q"][0]), "q must be"),
    "batch of k_new": (lambda i: i.update(k_new=i["k_new"][:1]), "k_new must have shape"),
    "v_cache slots": (lambda i: i.update(v_cache=i["v_cache"][:, :, 1:]), "v_cache must have shape"),
    "ring slots": (lambda i: i.update(k_cache=i["k_cache"][:, :, 1:], v_cache=i["v_cache"][:, :, 1:]), "slots"),
    "heads not a multiple": (lambda i: i.update(q=i["q"][:, :7]), "multiple"),
    "dtype of v_new": (lambda i: i.update(v_new=i["v_new"].double()), "v_new must have the dtype"),
    "float64": (
        lambda i: i.update({n: i[n].double() for n in ("q", "k_new", "v_new", "k_cache", "v_cache")}),
        "supported: float16",
    ),
    "seq_lens int64": (lambda i: i.update(seq_lens=i["seq_lens"].long()), "seq_lens must be int32"),
    "seq_lens shape": (lambda i: i.update(seq_lens=i["seq_lens"][:1]), "seq_lens must have shape"),
    "pad dtype": (lambda i: i.update(pad=torch.zeros(2)), "pad must be"),
    "strided head_dim": (lambda i: i.update(q=i["q"].repeat_interleave(2, -1)[..., ::2]), "contiguous in head_dim"),
    "expanded cache": (lambda i: i.update(k_cache=i["k_cache"][:1].expand(2, -1, -1, -1)), "expanded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_raise_and_write_nothing(device, name):
    case = Case((5, 20), 2, sink=2, window=8).on(device, torch.bfloat16)
    inputs = case.build()
    before = {n: inputs[n].clone() for n in ("k_cache", "v_cache")}
    caches = {n: inputs[n] for n in before}
    spoil, message = BAD[name]
    spoil(inputs)
    if inputs["pad"] is not None:
        inputs["pad"] = inputs["pad"].to(device)
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(inputs, case)
    for n, cache in caches.items():
        assert torch.equal(torch.nan_to_num(cache), torch.nan_to_num(before[n]))


@pytest.mark.parametrize("sink,window", [(-1, 8), (2, -1)])
def test_negative_sink_or_window(device, sink, window):
    inputs = Case((5,), 1).on(device, torch.bfloat16).build()
    with pytest.raises((RuntimeError, ValueError), match=r"\[0, 2\^31\)"):
        ops.attention(**inputs, sink=sink, window=window)


@needs_cuda
def test_mixed_devices_and_float32_on_cuda():
    case = Case((5, 20), 1).on("cuda", torch.bfloat16)
    with pytest.raises(RuntimeError, match="on the device of"):
        inputs = case.build()
        call(inputs | {"k_cache": inputs["k_cache"].cpu()}, case)
    with pytest.raises(RuntimeError, match="float32 is not supported on CUDA"):
        call(Case((5, 20), 1).on("cuda", torch.float32).build(), case)


@needs_cuda
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("q_len", [1, 4])
def test_one_captured_graph_serves_every_length(q_len, window):
    case = Case((0, 7), q_len, sink=4, window=window, spare_slots=400).on("cuda", torch.bfloat16)
    inputs = case.build()
    workspace = ops.new_workspace("cuda")
    run = lambda: ops.attention(**inputs, sink=4, window=window, scale=0.125, workspace=workspace)  # noqa: E731
    stream = torch.cuda.Stream()
    pristine = {n: inputs[n].clone() for n in ("k_cache", "v_cache")}
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = run()
    for name, tensor in pristine.items():
        inputs[name].copy_(tensor)
    for step in range(60):
        for name in ("q", "k_new", "v_new"):
            inputs[name].copy_(torch.randn_like(inputs[name]))
        expected, *_ = specification(inputs, case)
        graph.replay()
        torch.testing.assert_close(out.cpu().double(), expected, atol=2e-2, rtol=2e-2, msg=f"step {step}")
        inputs["seq_lens"] += q_len


@needs_cuda
@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("q_len", [1, 16])
def test_one_launch_per_decode_call(q_len, window):
    case = Case((300, 7), q_len, sink=4, window=window).on("cuda", torch.bfloat16)
    inputs = case.build()
    workspace = ops.new_workspace("cuda")
    run = lambda: ops.attention(**inputs, sink=4, window=window, scale=0.125, workspace=workspace)  # noqa: E731
    run()
    kernels = launched_kernels(run)
    assert len(kernels) == 1 and "decode" in kernels[0], kernels


@pytest.mark.parametrize("length", [-1, -8, 2**31 - 2])
def test_lengths_out_of_range(length):
    """The CPU can look at them; on CUDA a negative length counts as 0."""
    inputs = Case((5, 20), 2, sink=2, window=8).on("cpu", torch.float32).build()
    inputs["seq_lens"][1] = length
    with pytest.raises(RuntimeError, match=r"seq_lens\[1\] must be in"):
        ops.attention(**inputs, sink=2, window=8)
    with pytest.raises(RuntimeError, match=r"seq_lens\[1\] must be in"):
        ops.append(*(inputs[n] for n in ("k_new", "v_new", "k_cache", "v_cache", "seq_lens")), sink=2, window=8)


def test_sink_and_window_that_overflow(device):
    inputs = Case((5,), 1).on(device, torch.bfloat16).build()
    with pytest.raises((RuntimeError, ValueError), match=r"sink \+ window must be < 2\^31"):
        ops.attention(**inputs, sink=2**31 - 1, window=5)


SHARED = {
    "k_cache and v_cache share memory": lambda i: i.update(v_cache=i["k_cache"]),
    "k_cache and seq_lens share memory": lambda i: i.update(seq_lens=i["k_cache"].view(torch.int32).flatten()[:2]),
    "k_new and k_cache share memory": lambda i: i.update(k_new=i["k_cache"][:, :, 3:4]),
    "v_cache and pad share memory": lambda i: i.update(pad=i["v_cache"].view(torch.int32).flatten()[6:8]),
    "v_cache and cache_rows share memory": lambda i: i.update(cache_rows=i["v_cache"].view(torch.int32).flatten()[6:8]),
    "q and out share memory": lambda i: i.update(out=i["q"]),
    "k_cache and out share memory": lambda i: i.update(out=i["k_cache"].flatten()[: i["q"].numel()].view(i["q"].shape)),
    "out and lse share memory": lambda i: i.update(lse=i["out"].flatten()[:16].view(torch.float32).view(2, 4, 1)),
}


@pytest.mark.parametrize("message", SHARED)
def test_memory_that_is_written_to_is_shared_with_nothing(device, message):
    """Each of these wrote over lengths or caches that other threads were reading: a crash, or anything."""
    case = Case((5, 20), 1, group=2, sink=2, window=8).on(device, torch.bfloat16)
    inputs = case.build() | {"k_scale": None, "v_scale": None}
    inputs["out"] = torch.zeros_like(inputs["q"])
    SHARED[message](inputs)
    for name in ("seq_lens", "pad", "cache_rows"):  # numbers that would be valid
        if inputs.get(name) is not None and name in message:
            inputs[name].zero_()
    before = {n: inputs[n].clone() for n in ("k_cache", "v_cache")}
    with pytest.raises(RuntimeError, match=message):
        call(inputs, case)
    for name, cache in before.items():
        assert torch.equal(torch.nan_to_num(cache), torch.nan_to_num(inputs[name]))


@pytest.mark.parametrize("between", ["slots", "heads", "rows", "dims"])
def test_caches_may_alternate_in_one_buffer(device, dtype, between):
    case = Case((5, 20), 3, sink=2, window=9).on(device, dtype)
    inputs, joint = case.build(), case.build()
    batch, heads, slots, dim = joint["k_cache"].shape
    both = (
        {
            "slots": lambda: torch.zeros(batch, slots, 2, heads, dim).permute(2, 0, 3, 1, 4),
            "heads": lambda: torch.zeros(batch, heads, 2, slots, dim).permute(2, 0, 1, 3, 4),
            "rows": lambda: torch.zeros(batch, 2, heads, slots, dim).permute(1, 0, 2, 3, 4),
            "dims": lambda: torch.zeros(batch, heads, slots, 2, dim).permute(3, 0, 1, 2, 4),
        }[between]()
        .to(dtype)
        .to(device)
    )
    for view, name in zip(both, ("k_cache", "v_cache"), strict=True):
        joint[name] = view.copy_(joint[name])
    out, lse = call(joint, case)
    want, want_lse = call(inputs, case)
    assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert torch.equal(torch.nan_to_num(joint["v_cache"]), torch.nan_to_num(inputs["v_cache"]))


def test_a_tensor_without_memory_among_others_is_named():
    inputs = Case((5, 20), 1).build()
    for name in ("k_new", "v_cache", "seq_lens"):
        with pytest.raises(RuntimeError, match=f"{name} must be on the device of q, cpu; got meta"):
            ops.attention(**inputs | {name: inputs[name].to("meta")})
    names = ("k_new", "v_new", "k_cache", "v_cache", "seq_lens")
    with pytest.raises(RuntimeError, match="seq_lens must be on the device of k_new, cpu; got meta"):
        ops.append(*(inputs[n].to("meta" if n == "seq_lens" else "cpu") for n in names))
    state = torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3)
    with pytest.raises(RuntimeError, match="lse_b must be on the device of out_a, cpu; got meta"):
        ops.merge_states(*state, state[0], state[1].to("meta"))
    assert ops.attention(**{n: t if t is None else t.to("meta") for n, t in inputs.items()})[0].is_meta


@pytest.mark.parametrize("batch,q_len", [(2, 0), (0, 3)])
def test_no_token_to_rotate(device, dtype, batch, q_len):
    q, new = (torch.zeros(batch, h, q_len, 64, dtype=dtype, device=device) for h in (4, 2))
    cache = torch.zeros(batch, 2, 8, 64, dtype=dtype, device=device)
    tables = torch.ones(batch, q_len, 64, device=device)
    lengths = torch.zeros(batch, dtype=torch.int32, device=device)
    out, lse = ops.attention(q, new, new, cache, cache.clone(), lengths, cos=tables, sin=tables)
    assert out.shape == q.shape and lse.shape == q.shape[:3]


@pytest.mark.parametrize("other", [0.0, float("-inf"), float("nan")])
def test_a_state_that_is_not_a_number_stays_one(device, dtype, other):
    out = torch.randn(1, 2, 3, 64, dtype=dtype, device=device)
    nan, lse = (torch.full((1, 2, 3), value, device=device) for value in (float("nan"), other))
    for states in ((out, nan, out, lse), (out, lse, out, nan)):
        merged, merged_lse = ops.merge_states(*states)
        assert merged.isnan().all() and merged_lse.isnan().all()
        expected, expected_lse = reference.merge_states(*states)
        assert expected.isnan().all() and expected_lse.isnan().all()
