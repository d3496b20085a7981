"""Chunks of prompts over full caches around the edges of the prefill kernels' tiles: 128 rows (tokens x heads of a group), 128
keys, keys shared out over blocks or not. Slots that hold nothing are NaN, of codes every byte and scales that are not numbers."""

import itertools
from dataclasses import replace

import pytest
import torch
from gpu import launched_kernels, needs_cuda
from op_cases import Case, call, check
from processes import run
from quant_cases import SAME, quantised
from quant_cases import call as call_codes
from quant_cases import check as check_codes

from zigzag_ext.attention import ops

LENGTHS = (0, 1, 127, 128, 129, 255, 256, 1000)  # tokens held
CHUNKS = (17, 31, 32, 33, 64, 127, 128, 129, 300)
PAIRS = (*SAME, ("int8", "int4"))
HALVES = (torch.bfloat16, torch.float16)
# Slots decide over how many blocks keys are shared out: of the lengths the host knows no more.
SPARE = (0, 700, 40_000)

each_head_dim = pytest.mark.parametrize("head_dim", [64, 128])
each_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


def on_gpu(case: Case, dtype: torch.dtype = torch.bfloat16) -> Case:
    return replace(case, device="cuda", dtype=dtype)


@needs_cuda
@each_head_dim
@pytest.mark.parametrize("q_len", CHUNKS)
def test_tile_edges(q_len, head_dim):
    for dtype in HALVES:
        check(on_gpu(Case(LENGTHS, q_len, head_dim=head_dim), dtype))


@needs_cuda
@each_head_dim
@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 16])
def test_group_sizes(group, head_dim):
    for q_len, spare in itertools.product((17, 70, 200), SPARE):
        check(on_gpu(Case((300,), q_len, group=group, head_dim=head_dim, spare_slots=spare)))


@needs_cuda
@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("length", [0, 100, 128 * 20 - 17, 128 * 20, 5000])
def test_keys_shared_out(length, num_kv_heads):
    """One block per tile of rows, a few, and more blocks than the keys have steps."""
    for q_len, spare in itertools.product((17, 40, 300), SPARE):
        check(on_gpu(Case((length,), q_len, num_kv_heads=num_kv_heads, head_dim=128, spare_slots=spare)))


@needs_cuda
@pytest.mark.parametrize("spare", SPARE)
def test_padded_and_skipped_rows(spare):
    padded = Case((0, 130, 5, 700), 150, pad=(0, 7, 150, 149), head_dim=128, spare_slots=spare)
    check(on_gpu(padded))
    check(on_gpu(replace(padded, pad=(-3, 128, 129, 1000), strided=True)))
    check(on_gpu(Case((0, 130, 700), 40, pad=(3, 0, 39), cache_rows=(4, -1, 0), head_dim=128, spare_slots=spare)))


@needs_cuda
@pytest.mark.parametrize("spare", SPARE)
@pytest.mark.parametrize("softcap,sinks", [(0.0, True), (20.0, False), (20.0, True)], ids=["sinks", "cap", "both"])
def test_caps_and_learned_sinks(softcap, sinks, spare):
    check(on_gpu(Case((0, 130, 700), 90, pad=(3, 0, 90), softcap=softcap, sink_logits=sinks, head_dim=128, spare_slots=spare)))


@needs_cuda
@pytest.mark.parametrize("spare", SPARE)
def test_strides_and_negative_scales(spare):
    case = on_gpu(Case((0, 300), 90, head_dim=128, strided=True, spare_slots=spare))
    check(case)
    inputs, turned = case.build(), case.build()
    turned["q"] = -turned["q"]
    out, lse = call(inputs, case)
    same_out, same_lse = ops.attention(**turned, scale=-(case.head_dim**-0.5))
    assert torch.equal(out, same_out) and torch.equal(lse, same_lse)


@needs_cuda
def test_keys_that_all_query_heads_share_without_memory_of_their_own():
    """k_new and v_new expanded over the batch: a stride of 0, which copies of boxes do not take."""
    case = on_gpu(Case((300, 300), 150, head_dim=128))
    inputs, copied = case.build(), case.build()
    for name in ("k_new", "v_new"):
        inputs[name] = inputs[name][:1].expand(2, -1, -1, -1)
        copied[name] = inputs[name].contiguous()
    for mine, theirs in zip(call(inputs, case), call(copied, case), strict=True):
        assert torch.equal(mine, theirs)


@needs_cuda
@each_pair
@each_head_dim
@pytest.mark.parametrize("q_len", [17, 33, 128, 300])
def test_codes_at_tile_edges(q_len, head_dim, pair):
    for dtype in HALVES:
        check_codes(on_gpu(Case(LENGTHS, q_len, head_dim=head_dim), dtype), pair)


@needs_cuda
@each_pair
@pytest.mark.parametrize("spare", SPARE)
def test_codes_in_groups_padded_and_shared_out(spare, pair):
    for group in (1, 7, 8):
        check_codes(on_gpu(Case((300,), 70, group=group, head_dim=128, spare_slots=spare)), pair)
    padded = Case((0, 130, 5, 700), 150, pad=(0, 7, 150, 149), head_dim=128, spare_slots=spare)
    check_codes(on_gpu(padded), pair)
    check_codes(on_gpu(replace(padded, pad=(-3, 128, 129, 1000), strided=True)), pair)
    check_codes(on_gpu(Case((0, 130, 700), 40, pad=(3, 0, 39), cache_rows=(4, -1, 0), head_dim=128, spare_slots=spare)), pair)


@needs_cuda
@pytest.mark.parametrize("spare", SPARE)
def test_repeats_have_equal_bits(spare):
    for pair in (None, ("fp8", "fp8")):
        case = on_gpu(Case((5000,), 100, head_dim=128, spare_slots=spare))
        run_call = call if pair is None else call_codes
        results = [run_call(case.build() if pair is None else quantised(case, pair), case) for _ in range(3)]
        assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


@needs_cuda
@pytest.mark.parametrize("pair", [None, *PAIRS], ids=lambda p: p and "-".join(p))
def test_one_pass_over_the_keys(pair):
    """Where the pipeline serves: its launch, one that merges where keys are shared out, and the append."""
    case = on_gpu(Case((4000,), 64, head_dim=128))
    if not ops.splits_prompts(torch.device("cuda", 0), case.head_dim):
        pytest.skip("this GPU, build or environment has no pipeline kernel")
    inputs = case.build() if pair is None else quantised(case, pair)
    workspace = ops.new_workspace("cuda")
    names = launched_kernels(lambda: (call if pair is None else call_codes)(inputs | {"workspace": workspace}, case))
    launched = [part for name in names for part in ("pipeline", "merge_parts", "append") if f"{part}_" in name]
    order = ["pipeline", "merge_parts", "append"] if pair is None else ["append", "pipeline", "merge_parts"]
    assert launched == order, names


@needs_cuda
@pytest.mark.parametrize("variable,value", [("SPLITS", "1"), ("SPLITS", "5"), ("SPLITS", "160"), ("KERNEL", "tiles")])
def test_forced_ways(variable, value, monkeypatch):
    monkeypatch.setenv(f"ZIGZAG_PREFILL_{variable}", value)
    assert "done" in run("""
        import torch
        from op_cases import Case, check
        from quant_cases import check as check_codes

        for head_dim in (64, 128):
            for dtype in (torch.bfloat16, torch.float16):
                for q_len in (17, 129):
                    check(Case((0, 129, 1500), q_len, head_dim=head_dim).on("cuda", dtype))
                    check_codes(Case((0, 129, 1500), q_len, head_dim=head_dim).on("cuda", dtype), ("int8", "int8"))
        print("done")
    """)


def test_the_pipeline_serves_no_cpu():
    assert not ops.splits_prompts(torch.device("cpu"), 128)
