"""RoPE inside the attention op, against the specification: rotate, then attend and append."""

import pytest
import torch
from op_cases import Case, after_rope, call, check

from zigzag_ext.attention import ops

ROTARY_DIMS = {
    64: (8, 24, 32, 64),
    80: (32, 80),
    96: (40, 96),
    128: (8, 64, 120, 128),
    192: (64, 192),
    256: (64, 256),
    512: (128, 512),
}
LAYERS = [(0, 0), (4, 24)]  # sink, window


@pytest.mark.parametrize("sink,window", LAYERS)
@pytest.mark.parametrize("q_len", [1, 5])
@pytest.mark.parametrize("head_dim", ops.HEAD_DIMS)
def test_rotary_dims(device, dtype, head_dim, q_len, sink, window):
    for rotary_dim in ROTARY_DIMS[head_dim]:
        for table_dtype in {torch.float32, dtype}:
            case = Case((0, 33, 200), q_len, head_dim=head_dim, sink=sink, window=window)
            case = Case(**vars(case) | {"rotary_dim": rotary_dim, "table_dtype": table_dtype})
            check(case.on(device, dtype))


@pytest.mark.parametrize("sink,window", LAYERS)
@pytest.mark.parametrize("q_len", range(1, ops.MAX_DECODE_QUERIES + 1))
@pytest.mark.parametrize("shared", [False, True])
def test_query_lengths(device, dtype, q_len, sink, window, shared):
    case = Case((0, 3, 27, 28, 29, 500), q_len, sink=sink, window=window, rotary_dim=64, shared_table=shared)
    check(case.on(device, dtype))


@pytest.mark.parametrize("sink,window", LAYERS)
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("group", range(1, ops.MAX_GROUP_SIZE + 1))
def test_group_sizes(device, dtype, group, q_len, sink, window):
    check(Case((7, 90), q_len, group=group, head_dim=128, sink=sink, window=window, rotary_dim=128).on(device, dtype))


@pytest.mark.parametrize("sink,window", LAYERS)
@pytest.mark.parametrize("q_len", [1, 4, 16])
@pytest.mark.parametrize("strided", [False, True])
def test_padding_and_strides(device, dtype, q_len, sink, window, strided):
    pad = (q_len, 0, q_len // 2, 1, q_len - 1)
    case = Case((0, 0, 9, 40, 0), q_len, pad=pad, sink=sink, window=window, strided=strided, rotary_dim=32)
    check(case.on(device, dtype))


@pytest.mark.parametrize("sink,window", [(0, 1), (3, 4), (64, 256)])
@pytest.mark.parametrize("q_len", [1, 2, 16])
def test_ring_edges(device, dtype, sink, window, q_len):
    lengths = {max(0, e + d) for e in (0, sink, sink + window, sink + 3 * window) for d in (-1, 0, 1)}
    check(Case(tuple(sorted(lengths)), q_len, sink=sink, window=window, rotary_dim=64).on(device, dtype))


@pytest.mark.parametrize("q_len", [1, 3])
def test_many_rows_and_long_contexts(device, dtype, q_len):
    """More (row, head) pairs than a GPU has multiprocessors, one head over many blocks, one cluster per head."""
    check(Case(tuple(range(0, 640, 20)), q_len, num_kv_heads=8, group=2, rotary_dim=64).on(device, dtype))
    check(Case((20_000, 3), q_len, num_kv_heads=1, rotary_dim=64).on(device, dtype))
    check(Case((1000,), q_len, num_kv_heads=8, head_dim=128, rotary_dim=128).on(device, dtype))


@pytest.mark.parametrize("sink,window", LAYERS)
@pytest.mark.parametrize("q_len", [1, 6])
def test_no_cache_and_no_free_slot(device, dtype, q_len, sink, window):
    """Without slots the chunk still attends its rotated self; past the capacity a rotated key counts but is not kept."""
    case = Case((30, 10), q_len, sink=sink, window=window, rotary_dim=64).on(device, dtype)
    inputs = case.build()
    for slots in (0, 30) if window == 0 else (0,):
        cut = inputs | {n: inputs[n][:, :, :slots].clone() for n in ("k_cache", "v_cache")}
        if slots == 0:
            cut["seq_lens"] = torch.zeros_like(cut["seq_lens"])
        before = {n: t if t is None else t.clone() for n, t in after_rope(cut).items()}
        out, lse = call(cut, case)
        expected_out, expected_lse = call(before, case)
        torch.testing.assert_close(out, expected_out, rtol=2e-2, atol=2e-2 if dtype != torch.float32 else 1e-5)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=5e-3 if dtype != torch.float32 else 1e-4)


BAD = {
    "only cos": (lambda i: i.pop("sin"), "both or neither"),
    "rotary_dim 12": (lambda i: i.update(cos=i["cos"][..., :12], sin=i["sin"][..., :12]), "multiple of 8, at most head_dim = 64"),
    "rotary_dim 0": (lambda i: i.update(cos=i["cos"][..., :0], sin=i["sin"][..., :0]), "must be positive"),
    "rotary_dim above head_dim": (lambda i: i.update(cos=i["cos"].repeat(1, 1, 2), sin=i["sin"].repeat(1, 1, 2)), "got 80"),
    "cos and sin differ": (lambda i: i.update(sin=i["sin"][..., :32]), "same rotary_dim and dtype"),
    "dtype": (
        lambda i: i.update(cos=i["cos"].half(), sin=i["sin"].half()),
        "cos must be float32 or have the dtype of q, got Half",
    ),
    "q_len": (lambda i: i.update(cos=i["cos"][:, :1]), r"\[2 or 1, 2, rotary_dim\]"),
    "four sizes": (lambda i: i.update(cos=i["cos"][:, None]), "cos must be"),
    "last dim strided": (lambda i: i.update(cos=i["cos"].repeat_interleave(2, -1)[..., ::2]), "contiguous in rotary_dim"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_raise_and_write_nothing(device, name):
    case = Case((5, 20), 2, sink=2, window=8, rotary_dim=40).on(device, torch.bfloat16)
    inputs = case.build()
    before = {n: inputs[n].clone() for n in ("k_cache", "v_cache")}
    spoil, message = BAD[name]
    spoil(inputs)
    with pytest.raises(RuntimeError, match=message):
        call(inputs, case)
    for n, cache in before.items():
        assert torch.equal(torch.nan_to_num(cache), torch.nan_to_num(inputs[n]))


@pytest.mark.parametrize("window", [0, 8])
def test_prefill_takes_rotated_keys_only(device, window):
    case = Case((5,), ops.MAX_DECODE_QUERIES + 1, sink=2, window=window, rotary_dim=64).on(device, torch.bfloat16)
    with pytest.raises(RuntimeError, match="up to 16 new tokens a call, got 17; apply RoPE before"):
        call(case.build(), case)


def test_tables_of_transformers(device, dtype):
    """`position_embeddings` and `apply_rotary_pos_emb` of a Llama, at the positions of a chunk."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=512, num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    case = Case((5, 40), 3, sink=2, window=16).on(device, dtype)
    inputs = case.build()
    position = inputs["seq_lens"][:, None] + torch.arange(3, device=device)
    cos, sin = llama.LlamaRotaryEmbedding(config).to(device)(inputs["q"], position)
    wide = llama.apply_rotary_pos_emb(*(inputs[n].double() for n in ("q", "k_new")), cos.double(), sin.double())
    fused = {n: t.clone() if n.endswith("cache") else t for n, t in inputs.items()} | {"cos": cos, "sin": sin}
    apart = inputs | {"q": wide[0].to(dtype), "k_new": wide[1].to(dtype)}
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(call(fused, case), call(apart, case), rtol=tolerance, atol=tolerance)
    fused_keys, keys = (torch.nan_to_num(i["k_cache"]).double() for i in (fused, apart))
    torch.testing.assert_close(fused_keys, keys, rtol=torch.finfo(dtype).eps, atol=2e-6)
