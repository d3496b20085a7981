"""`attention` of some heads: a layer whose KV heads have caches of two kinds is two calls into one output."""

from dataclasses import replace

import pytest
import torch
from op_cases import FLOOR, Case, after_rope, relative_error
from quant_cases import is_served

from zigzag_ext.attention import ops, reference

SINK, WINDOW = 4, 24
HEADS = {"full": [3, 0, 2], "ring": [4, 1]}  # of five KV heads, in no order: what matters is that of the caches
ROPE = {"rotary_dim": 32, "table_dtype": torch.float32}  # of up to 16 tokens
CHUNKS = [(n, {}) for n in (1, 2, 16, 17, 64, 129)] + [(n, ROPE) for n in (1, 2, 16)]


def parts(case: Case, kinds=HEADS) -> dict[str, tuple[Case, torch.Tensor]]:
    """The case of each kind of heads, and their numbers."""
    layouts = {"full": case, "ring": replace(case, sink=SINK, window=WINDOW)}
    return {
        kind: (replace(layouts[kind], num_kv_heads=len(heads)), torch.tensor(heads, dtype=torch.int32, device=case.device))
        for kind, heads in kinds.items()
    }


def build(case: Case, kinds=HEADS):
    """Inputs of the layer, and by kind its caches."""
    inputs = case.build()
    caches = {kind: part.build(seed=7) for kind, (part, _) in parts(case, kinds).items()}
    caches = {kind: {name: built[name] for name in ("k_cache", "v_cache")} for kind, built in caches.items()}
    return {name: t for name, t in inputs.items() if name not in ("k_cache", "v_cache")}, caches


def two_calls(case: Case, inputs: dict, caches: dict, kinds=HEADS):
    out, lse = ops.new_output(inputs["q"])
    out.fill_(torch.nan), lse.fill_(torch.nan)
    for kind, (part, heads) in parts(case, kinds).items():
        ops.attention(**inputs, **caches[kind], heads=heads, out=out, lse=lse, sink=part.sink, window=part.window, scale=0.2)
    return out, lse


def expected(case: Case, inputs: dict, caches: dict):
    """`reference.attention` in float64 on the CPU; `caches` are its own."""
    wide = {n: t if t is None else t.cpu() if t.dtype == torch.int32 else t.cpu().double() for n, t in after_rope(inputs).items()}
    out, lse = torch.full_like(wide["q"], torch.nan), torch.full(wide["q"].shape[:3], torch.nan)
    for kind, (part, heads) in parts(case).items():
        tensors = [wide[n] for n in ("q", "k_new", "v_new")] + list(caches[kind].values()) + [wide["seq_lens"]]
        options = {"pad": wide["pad"], "heads": heads.cpu(), "sink": part.sink, "window": part.window}
        reference.attention(*tensors, **options, out=out, lse=lse, scale=0.2)
    return out, lse


@pytest.mark.parametrize("q_len,rope", CHUNKS)
@pytest.mark.parametrize("group,head_dim", [(1, 64), (4, 128), (7, 80)])
def test_two_calls_are_the_specification(device, dtype, group, head_dim, q_len, rope):
    lengths, pad = (0, 3, SINK + WINDOW, 200, 61), (0, 1, 0, q_len, q_len // 2)
    case = replace(Case(lengths, q_len, group, 5, head_dim, pad=pad, **rope).on(device, dtype), spare_slots=20)
    inputs, caches = build(case)
    wide = {kind: {n: t.cpu().double() for n, t in held.items()} for kind, held in caches.items()}
    want_out, want_lse = expected(case, inputs, wide)
    out, lse = (t.cpu() for t in two_calls(case, inputs, caches))
    padding = torch.isneginf(want_lse)
    assert torch.equal(torch.isneginf(lse), padding) and (out[padding] == 0).all()
    assert relative_error(out[~padding], want_out[~padding]) <= 4 * FLOOR[dtype]
    torch.testing.assert_close(lse[~padding], want_lse[~padding].float(), atol=2e-3, rtol=1e-4)
    for kind, held in caches.items():
        for name, cache in held.items():
            exact = not rope or name == "v_cache"
            eps = 0 if exact else torch.finfo(dtype).eps
            torch.testing.assert_close(cache.cpu().double(), wide[kind][name], rtol=eps, atol=eps, equal_nan=True)


@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize("kind", ["full", "ring"])
def test_all_heads_in_order_are_attention_bit_for_bit(device, dtype, kind, q_len):
    kinds = {kind: list(range(5))}
    case = Case((0, 90, 300), q_len, 4, 5, pad=(1, 0, 0)).on(device, dtype)
    inputs, caches = build(case, kinds)
    part, _ = parts(case, kinds)[kind]
    whole = {n: t.clone() for n, t in caches[kind].items()}
    want = ops.attention(**inputs, **whole, sink=part.sink, window=part.window, scale=0.2)
    got = two_calls(case, inputs, caches, kinds)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    for name, cache in whole.items():
        assert torch.equal(torch.nan_to_num(cache), torch.nan_to_num(caches[kind][name]))


@pytest.mark.parametrize("q_len", [1, 5, 40])
def test_heads_of_others_are_not_touched(device, dtype, q_len):
    case = Case((0, 90), q_len, 4, 5).on(device, dtype)
    inputs, caches = build(case)
    out, lse = ops.new_output(inputs["q"])
    out.fill_(3), lse.fill_(3)
    poisoned = {n: t.clone() for n, t in inputs.items() if t is not None}
    for name in ("k_new", "v_new"):
        poisoned[name][:, HEADS["full"]] = torch.nan
    part, heads = parts(case)["ring"]
    ops.attention(**poisoned, **caches["ring"], heads=heads, out=out, lse=lse, sink=part.sink, window=part.window)
    rows = torch.tensor(HEADS["full"], device=device)
    rows = (rows[:, None] * 4 + torch.arange(4, device=device)).flatten()
    assert (out[:, rows] == 3).all() and (lse[:, rows] == 3).all() and not out.isnan().any()


def test_an_output_of_other_strides(device, dtype):
    case = Case((60, 90), 3, 4, 5).on(device, dtype)
    inputs, caches = build(case)
    part, heads = parts(case)["full"]
    own = {n: t.clone() for n, t in caches["full"].items()}
    outs = [ops.new_output(inputs["q"])[0].zero_(), torch.zeros_like(inputs["q"]), torch.zeros(2, 20, 3, 96, dtype=dtype)]
    outs[2] = outs[2].to(device)[..., :64]
    for out in outs:
        lse = torch.zeros(2, 20, 3, device=device)
        cache = {n: t.clone() for n, t in own.items()}
        ops.attention(**inputs, **cache, heads=heads, out=out, lse=lse)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


BAD = {
    "heads must have shape \\[3\\]": {"heads": torch.tensor([0, 1], dtype=torch.int32)},
    "int32": {"heads": torch.tensor([0, 1, 2])},
    "distinct KV heads below 5, heads\\[2\\] is 0": {"heads": torch.tensor([0, 1, 0], dtype=torch.int32)},
    "heads\\[1\\] is 5": {"heads": torch.tensor([0, 5, 1], dtype=torch.int32)},
    "heads\\[0\\] is -1": {"heads": torch.tensor([-1, 4, 1], dtype=torch.int32)},
    "out must have shape": {"out": torch.zeros(2, 20, 2, 64)},
    "out must have the dtype of q": {"out": torch.zeros(2, 20, 1, 64, dtype=torch.bfloat16)},
    "out is written to": {"out": torch.zeros(2, 1, 1, 64).expand(2, 20, 1, 64)},
    "lse must have shape": {"lse": torch.zeros(2, 20)},
    "lse must be contiguous float32": {"lse": torch.zeros(2, 20, 1, dtype=torch.float64)},
    "names 6 KV heads": {
        "heads": torch.arange(6, dtype=torch.int32), "k_cache": torch.zeros(2, 6, 99, 64), "v_cache": torch.zeros(2, 6, 99, 64)
    },
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named_and_nothing_is_written(message):
    case = Case((60, 90), 1, 4, 5)
    inputs, caches = build(case)
    out, lse = torch.zeros(2, 20, 1, 64), torch.zeros(2, 20, 1)
    part, heads = parts(case)["full"]
    before = caches["full"]["k_cache"].clone()
    given = inputs | caches["full"] | {"heads": heads, "out": out, "lse": lse} | BAD[message]
    with pytest.raises(RuntimeError, match=message):
        ops.attention(**given)
    assert not out.any() and torch.equal(torch.nan_to_num(before), torch.nan_to_num(caches["full"]["k_cache"]))


@pytest.mark.parametrize("q_len", [1, 20])
def test_opcheck(device, q_len):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs, caches = build(case := Case((30,), q_len, 4, 5).on(device, dtype))
    part, heads = parts(case)["ring"]
    out, lse = ops.new_output(inputs["q"])
    cache = {n: torch.nan_to_num(t) for n, t in caches["ring"].items()}
    workspace = ops.new_workspace(device)
    tensors = [inputs[n] for n in ("q", "k_new", "v_new")] + list(cache.values()) + [inputs["seq_lens"], None, None, None]
    arguments = (*tensors, heads, None, out.zero_(), lse.zero_(), workspace, part.sink, part.window, 0.125)
    torch.library.opcheck(torch.ops.zigzag.attention_, arguments)


@pytest.mark.parametrize("q_len", [1, 5, 40])
@pytest.mark.parametrize("kind", ["full", "ring"])
@pytest.mark.parametrize("k_format,v_format", [("int8", "int8"), ("fp8", "int4"), ("int4", "int4")])
def test_quantised_heads_are_those_of_a_call_on_their_tensors_alone(device, dtype, kind, q_len, k_format, v_format):
    case = Case((20, 90), q_len, 4, 5, pad=(1, 0)).on(device, dtype)
    inputs, _ = build(case)
    part, heads = parts(case)[kind]
    if not is_served(device, (k_format, v_format), part.window):
        k_format, v_format = ("fp8", "fp8") if part.window else ("int8", "int4")  # the refusal: test_quantised.py
    geometry = (2, len(heads), part.slots, 64, dtype, torch.device(device))
    (k_cache, k_scale), (v_cache, v_scale) = (ops.new_cache(*geometry, kv_format) for kv_format in (k_format, v_format))
    cache = {"k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
    rng = torch.Generator().manual_seed(0)
    held = [torch.randn(2, len(heads), 90, 64, generator=rng).to(dtype).to(device) for _ in "kv"]
    ring, lengths = {"sink": part.sink, "window": part.window}, torch.zeros(2, dtype=torch.int32, device=device)
    for buffer in cache.values():
        buffer.view(torch.uint8).zero_()
    ops.append(*held, cache["k_cache"], cache["v_cache"], lengths, k_scale=cache["k_scale"], v_scale=cache["v_scale"], **ring)
    alone = {name: buffer.clone() for name, buffer in cache.items()}
    query_heads = (heads.long()[:, None] * 4 + torch.arange(4, device=device)).flatten()
    own = inputs | {n: inputs[n][:, heads.long()].contiguous() for n in ("k_new", "v_new")} | {"q": inputs["q"][:, query_heads]}
    own["q"] = own["q"].contiguous()
    want_out, want_lse = ops.attention(**own, **alone, **ring)
    out, lse = ops.new_output(inputs["q"])
    ops.attention(**inputs, **cache, heads=heads, out=out, lse=lse, **ring)
    assert torch.equal(out[:, query_heads], want_out) and torch.equal(lse[:, query_heads], want_lse)
    for name, buffer in cache.items():
        assert torch.equal(buffer.view(torch.uint8), alone[name].view(torch.uint8)), name
