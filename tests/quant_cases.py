"""Op cases over quantised caches: codes and scales in place of elements, built from the plain cases."""

from itertools import product

import torch
from op_cases import FLOOR, TENSORS, Case, relative_error

from zigzag_ext import ops, reference

FORMATS = ("fp8", "int8", "int4")
PAIRS = tuple(product(("none", *FORMATS), repeat=2))[1:]  # of K and V, without none + none


def garbage(codes: torch.Tensor, scale: torch.Tensor, unused: torch.Tensor, row: int) -> None:
    """What unwritten memory may hold: every byte, of fp8 that is NaN, and scales that are not numbers."""
    codes.view(torch.uint8)[row][:, unused] = 0xFF
    scale[row][:, unused] = torch.nan


def quantised(case: Case, pair: tuple[str, str], seed: int = 0) -> dict[str, torch.Tensor | None]:
    """Inputs of `case` with caches in the formats of `pair`, and k_scale, v_scale."""
    inputs = case.build(seed)
    for name, kv_format in zip("kv", pair, strict=True):
        plain, scale = inputs[f"{name}_cache"], None
        if kv_format != "none":
            codes, scale = reference.encode(plain.cpu(), ops.KV_FORMATS[kv_format])
            for b, length in enumerate(case.seq_lens):
                held = reference.position_of(case.slots, length, case.sink, case.window)
                garbage(codes, scale, held < 0, b)
            inputs[f"{name}_cache"], scale = codes.to(case.device), scale.to(case.device)
        inputs[f"{name}_scale"] = scale
    return inputs


def call(inputs: dict, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.attention(**inputs, sink=case.sink, window=case.window, scale=case.head_dim**-0.5)


def specification(inputs: dict, case: Case) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """out and lse in float64, and the caches and scales after the call."""
    wide = {n: None if t is None else t.cpu().clone() for n, t in inputs.items()}
    for name in ("q", "k_new", "v_new"):
        wide[name] = wide[name].double()
    for name in "kv":
        if wide[f"{name}_scale"] is None:
            wide[f"{name}_cache"] = wide[f"{name}_cache"].double()
    arguments = (*(wide[n] for n in TENSORS), case.sink, case.window, case.head_dim**-0.5)
    out, lse = reference.attention_(*arguments, k_scale=wide["k_scale"], v_scale=wide["v_scale"])
    return out, lse, wide


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    if actual.dtype.itemsize == 1:
        return torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8))
    return torch.equal(torch.nan_to_num(actual.cpu().double()), torch.nan_to_num(expected.double()))


def check(case: Case, pair: tuple[str, str], seed: int = 0) -> None:
    """Codes and scales bit-equal to the specification, out and lse within the rounding of the case's dtype."""
    inputs = quantised(case, pair, seed)
    expected_out, expected_lse, expected = specification(inputs, case)
    out, lse = (t.cpu() for t in call(inputs, case))
    padding = torch.isneginf(expected_lse)
    assert torch.equal(torch.isneginf(lse), padding) and (out[padding] == 0).all()
    error = relative_error(out[~padding], expected_out[~padding])
    assert error <= 2 * FLOOR[case.dtype], f"relative error {error:.2e}"
    torch.testing.assert_close(lse[~padding].double(), expected_lse[~padding].double(), atol=2e-3, rtol=1e-4)
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if inputs[name] is not None:
            assert same(inputs[name], expected[name]), f"{name} differs"
