"""Op cases over quantised caches: codes and scales in place of elements, built from the plain cases."""

from itertools import product

import torch
from op_cases import FLOOR, TENSORS, Case, after_rope

from zigzag_ext.attention import ops, reference

FORMATS = ("fp8", "int8", "int4")
PAIRS = tuple(product(("none", *FORMATS), repeat=2))[1:]  # of K and V, without none + none
SAME = tuple((f, f) for f in FORMATS)
CUDA_HEAD_DIMS = (64, 128)


def is_served(device: str, pair: tuple[str, str], window: int, head_dim: int = 64) -> bool:
    """Whether there are kernels: on CUDA for one format of both, in full caches also for int8 keys with int4 values."""
    compiled = pair in SAME or (not window and pair == ("int8", "int4"))
    return device == "cpu" or (compiled and head_dim in CUDA_HEAD_DIMS)


def garbage(codes: torch.Tensor, scale: torch.Tensor, unused: torch.Tensor, row: int) -> None:
    """What unwritten memory may hold: every byte, of fp8 that is NaN, and scales that are not numbers."""
    codes.view(torch.uint8)[row][:, unused] = 0xFF
    scale[row][:, unused] = torch.nan


def in_token_order(t: torch.Tensor, spare: int) -> torch.Tensor:
    """A copy of t [batch, heads, slots, ...] with tokens before heads in memory, and `spare` unused elements a row."""
    size = list(t.transpose(1, 2).shape)
    base = t.new_empty(*size[:-1], size[-1] + spare)
    return base[..., : size[-1]].transpose(1, 2).copy_(t)


def quantised(case: Case, pair: tuple[str, str], seed: int = 0, alter=None) -> dict[str, torch.Tensor | None]:
    """Inputs of `case` with caches in the formats of `pair`, and k_scale, v_scale. `alter` may change them before, in place."""
    inputs = case.build(seed)
    if alter is not None:
        alter(inputs)
    for name, kv_format in zip("kv", pair, strict=True):
        plain, scale = inputs[f"{name}_cache"], None
        if kv_format != "none":
            codes, scale = reference.encode(plain.cpu(), ops.KV_FORMATS[kv_format])
            for row in range(len(case.lengths)):
                garbage(codes, scale, case.held(row) < 0, row)
            codes, scale = codes.to(case.device), scale.to(case.device)
            if case.strided:
                codes, scale = in_token_order(codes, 16), in_token_order(scale, 0)
            inputs[f"{name}_cache"] = codes
        inputs[f"{name}_scale"] = scale
    return inputs


def call(inputs: dict, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.attention(**inputs, sink=case.sink, window=case.window, scale=case.head_dim**-0.5)


def specification(inputs: dict, case: Case) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """out and lse in float64, and the caches and scales after the call."""
    wide = after_rope({n: None if t is None else t.cpu().clone() for n, t in inputs.items()})
    for name in ("q", "k_new", "v_new"):
        wide[name] = wide[name].double()
    for name in "kv":
        if wide[f"{name}_scale"] is None:
            wide[f"{name}_cache"] = wide[f"{name}_cache"].double()
    options = {n: wide.get(n) for n in ("pad", "cache_rows", "k_scale", "v_scale")}
    options |= {"sink": case.sink, "window": case.window}
    out, lse = reference.attention(*(wide[n] for n in TENSORS), **options, scale=case.head_dim**-0.5)
    return out, lse, wide


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if actual.dtype.itemsize == 1:
        return torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8))
    return torch.equal(torch.nan_to_num(actual.cpu().double()), torch.nan_to_num(expected.double()))


WEIGHT_ROUNDING = 2.0**-11  # CUDA kernels multiply values by float16 weights, those of the CPU by float32 ones


def rounding_of_weights(inputs: dict, case: Case) -> torch.Tensor:
    """[batch, num_q_heads, q_len]: how far the rounding of its weights may move a row, `sum p_j |v_j|` times WEIGHT_ROUNDING.

    This is more than some roundings of the result where values cancel out, or where nearly all probability is on zeros. A
    value counts as one step of its format in every element, at least: steps are what kernels add up.
    """
    sizes = {}
    for name, codes, scale in (
        ("v_cache", inputs["v_cache"], inputs["v_scale"]),
        ("v_new", *reference.encode(inputs["v_new"], inputs["v_cache"].dtype)),
    ):
        norms = reference.decode(codes.cpu(), scale.cpu()).norm(dim=-1)
        sizes[name] = torch.maximum(norms, scale.cpu() * case.head_dim**0.5)[..., None].expand(*norms.shape, case.head_dim)
    return WEIGHT_ROUNDING * specification(inputs | sizes | {"v_scale": None}, case)[0][..., 0]


def check_close(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, roundings: int, slack=None) -> None:
    """Rows of head_dim within some roundings of their dtype, the smallest number it has included, and within `slack()` more."""
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps * out.shape[-1] ** 0.5
    error, size = (out.double() - expected.double()).norm(dim=-1), expected.double().norm(dim=-1)
    allowed = roundings * FLOOR[dtype] * size + smallest
    wrong = ~(error <= allowed)
    if slack is not None and wrong.any():
        wrong = ~(error <= allowed + slack())
    assert not wrong.any(), f"relative error {float((error / size)[wrong].max()):.2e}"


def check_call(inputs: dict, case: Case, roundings: int = 2):
    """Codes and scales bit-equal to the specification, out and lse within some roundings of the case's dtype.

    Returns out and, on a GPU, a function that tells how far it may be off by the rounding of weights.
    """
    before = {n: t if t is None else t.clone() for n, t in inputs.items()}
    slack = (lambda: rounding_of_weights(before, case)) if case.device == "cuda" else None
    expected_out, expected_lse, expected = specification(inputs, case)
    out, lse = (t.cpu() for t in call(inputs, case))
    padding = torch.isneginf(expected_lse)
    assert torch.equal(torch.isneginf(lse), padding) and (out[padding] == 0).all()
    check_close(out[~padding], expected_out[~padding], case.dtype, roundings, slack and (lambda: slack()[~padding]))
    torch.testing.assert_close(lse[~padding].double(), expected_lse[~padding].double(), atol=2e-3, rtol=1e-4)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if inputs[name] is not None:
            assert same(inputs[name], expected[name]), f"{name} differs"
    return out, slack


def check(case: Case, pair: tuple[str, str], seed: int = 0) -> None:
    check_call(quantised(case, pair, seed), case)
