"""Soft-capped logits and learned sink logits: every kernel against the specification, and what is refused."""

from dataclasses import replace

import pytest
import torch
from op_cases import Case, call, check, specification

from zigzag_ext.attention import ops, reference
from zigzag_ext.attention.chunk import LogitTerms
from zigzag_ext.attention.store import LayerStore
from zigzag_ext.planning.kv_format import parse_kv_format

EDGES = {
    "first_token": Case((0,)),
    "decode": Case((0, 1, 47, 300)),
    "splits": Case((2100,), group=2),
    "verify": Case((5, 130), q_len=5, group=8),
    "sixteen": Case((90,), q_len=16, head_dim=128),
    "prefill": Case((0, 33), q_len=70, head_dim=256),
    "ring": Case((0, 3, 12, 100), sink=2, window=10),
    "ring_with_slack": Case((9, 100), q_len=4, sink=2, window=10, slack=5),
    "ring_prefill": Case((50,), q_len=40, window=16),
    "padded": Case((0, 7), q_len=6, pad=(2, 6)),
    "one_query_head": Case((200,), group=1, head_dim=80),
    "sixteen_query_heads": Case((200,), group=16, head_dim=96, num_kv_heads=1),
    "rows": Case((5, 60), cache_rows=(1, -1), window=8, sink=1),
    "rope": Case((60,), q_len=2, rotary_dim=64),
}


@pytest.mark.parametrize("terms", [{"softcap": 3.0}, {"sink_logits": True}, {"softcap": 1.5, "sink_logits": True}], ids=str)
@pytest.mark.parametrize("name", EDGES)
def test_edges(device, dtype, name, terms):
    check(replace(EDGES[name], **terms).on(device, dtype))


@pytest.mark.parametrize("softcap", [1e-3, 50.0, 1e4])
def test_caps_of_every_size(device, dtype, softcap):
    check(Case((300,), q_len=3, softcap=softcap).on(device, dtype))


def test_a_large_sink_takes_all_and_a_small_one_nothing():
    case = Case((40,), sink_logits=True)
    inputs = case.build()
    plain, _ = call({**inputs, "sink_logits": None, "k_cache": inputs["k_cache"].clone()}, case)
    inputs["sink_logits"] = torch.tensor([1e4, -1e4] * 4)
    out, lse = call(inputs, case)
    assert (out[:, 0::2] == 0).all() and out[:, 1::2].equal(plain[:, 1::2])
    assert torch.allclose(lse[:, 0::2], torch.tensor(1e4)) and lse.isfinite().all()


def test_sinks_of_a_layer_whose_heads_take_two_calls():
    """Each call has the logits of all query heads and takes those of its own."""
    case = Case((30,), sink_logits=True, num_kv_heads=4)
    inputs = case.build()
    expected, lse, *_ = specification(inputs, case)
    out, own = ops.new_output(inputs["q"])
    for heads in ([2, 0], [1, 3]):
        caches = {n: inputs[n][:, heads].contiguous() for n in ("k_cache", "v_cache")}
        ops.attention(**{**inputs, **caches}, heads=torch.tensor(heads, dtype=torch.int32), out=out, lse=own)
    torch.testing.assert_close(out.double(), expected.double(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own.double(), lse.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_format", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("window", [0, 12])
def test_quantised_caches(kv_format, window):
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 1, 64, generator=rng) for heads in (4, 2, 2))
    sinks, results = torch.randn(4, generator=rng), []
    for attention in (ops.attention, reference.attention):
        caches = [ops.new_cache(2, 2, 2 + window if window else 40, 64, torch.float32, "cpu", kv_format) for _ in range(2)]
        for codes, scales in caches:
            codes.view(torch.uint8).zero_()
            scales.zero_()
        past = torch.Generator().manual_seed(4)
        scale_names = {"k_scale": caches[0][1], "v_scale": caches[1][1], "sink": 2 if window else 0, "window": window}
        for length in range(30):
            new = [torch.randn(2, 2, 1, 64, generator=past) for _ in range(2)]
            reference.append(*new, caches[0][0], caches[1][0], torch.full((2,), length, dtype=torch.int32), **scale_names)
        lengths = torch.full((2,), 30, dtype=torch.int32)
        terms = {"softcap": 2.0, "sink_logits": sinks, **scale_names}
        results.append(attention(q, k, v, caches[0][0], caches[1][0], lengths, **terms))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), expected.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "terms, message",
    [
        ({"softcap": -1.0}, "softcap must be finite and >= 0"),
        ({"softcap": float("inf")}, "softcap must be finite and >= 0"),
        ({"softcap": float("nan")}, "softcap must be finite and >= 0"),
        ({"sink_logits": torch.zeros(7)}, "sink_logits"),
        ({"sink_logits": torch.zeros(8, dtype=torch.float64)}, "sink_logits must be contiguous float32"),
        ({"sink_logits": torch.zeros(16)[::2]}, "sink_logits must be contiguous float32"),
        ({"sink_logits": torch.zeros(8, device="meta")}, "sink_logits must be on the device of q"),
    ],
)
def test_refused(terms, message):
    inputs = Case((5,)).build()
    before = inputs["k_cache"].clone()
    with pytest.raises(RuntimeError, match=message):
        ops.attention(**inputs, **terms)
    assert torch.equal(torch.nan_to_num(before), torch.nan_to_num(inputs["k_cache"]))


def test_smoothed_keys_are_refused():
    store = LayerStore(kv_format=parse_kv_format("kv_format", "int8"), smooth=True)
    k = torch.randn(1, 2, 20, 64)
    store.allocate(k, 32, 32)
    with pytest.raises(ValueError, match="key_smoothing moves all logits"):
        store.attend(k, k, k, None, None, terms=LogitTerms(softcap=2.0))


@pytest.mark.parametrize("window", [0, 8])
def test_opcheck(window):
    inputs = Case((5, 20), 3, sink=2, window=window).build()
    caches = {n: torch.zeros_like(inputs[n]) for n in ("k_cache", "v_cache")}
    out, lse = ops.new_output(inputs["q"])
    new = [inputs[n] for n in ("q", "k_new", "v_new")]
    tensors = (*new, *caches.values(), inputs["seq_lens"], None, None, None, None, None, out, lse, ops.new_workspace("cpu"))
    torch.library.opcheck(torch.ops.zigzag.attention_, (*tensors, 2, window, 0.1, None, None, 2.0, torch.randn(8)))
