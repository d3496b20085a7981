"""ZigzagAttention: equal to the reference step by step, and one compiled graph for every length."""

import copy

import pytest
import torch
from gpu import needs_cuda
from interrupts import Places
from torch._dynamo.utils import counters

import zigzag_ext as zz
from zigzag_ext.attention import reference

HEADS, KV_HEADS, HEAD_DIM, SINK, WINDOW = 4, 2, 64, 2, 6
LAYERS = {"streaming": {"sink": SINK, "window": WINDOW}, "retrieval": {"max_len": 64}}
every_kind = pytest.mark.parametrize("kind", LAYERS)


def new_layer(kind, **options):
    return zz.ZigzagAttention(HEADS, KV_HEADS, HEAD_DIM, kind=kind, **LAYERS[kind] | options)


def tokens(batch, q_len, seed, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, h, q_len, HEAD_DIM, generator=generator).to(device, dtype) for h in (HEADS, KV_HEADS, KV_HEADS)]


@every_kind
def test_prompt_and_steps_equal_the_reference(kind, device, dtype):
    layer = new_layer(kind, max_batch=2, dtype=dtype, device=device)
    keys, values = layer.k_cache.cpu().double(), layer.v_cache.cpu().double()
    lengths, pad = torch.zeros(2, dtype=torch.int32), torch.tensor([0, 3], dtype=torch.int32)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for step, q_len in enumerate([21, 1, 1, 5, 1, 1, 1, 1, 1, 1, 1]):
        q, k, v = tokens(2, q_len, step, dtype, device)
        chunk_pad = pad if step == 0 else None
        out = layer(q, k, v, pad=None if chunk_pad is None else chunk_pad.to(device))
        inputs = [t.cpu().double() for t in (q, k, v)]
        ring = {"sink": layer.sink, "window": layer.window}
        expected, _ = reference.attention(*inputs, keys, values, lengths, pad=chunk_pad, **ring)
        torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=tolerance)
        lengths += q_len if chunk_pad is None else q_len - chunk_pad
        assert layer.seq_lens.cpu().equal(lengths)


@every_kind
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_to_one_graph_for_every_length(kind, backend):
    torch._dynamo.reset()
    counters.clear()
    layer, eager = new_layer(kind), new_layer(kind)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        layer(*tokens(1, 9, 99)), eager(*tokens(1, 9, 99))
        for step in range(20):
            given = tokens(1, 1, step)
            torch.testing.assert_close(compiled(*given), eager(*given), atol=1e-6, rtol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert layer.seq_lens.tolist() == [29]


@every_kind
def test_reset_and_smaller_batches(kind):
    layer = new_layer(kind, max_batch=3)
    first = layer(*tokens(2, 10, 0))
    assert layer.seq_lens.tolist() == [10, 10, 0]
    layer.reset()
    assert layer.seq_lens.tolist() == [0, 0, 0]
    assert layer(*tokens(2, 10, 0)).equal(first)


def test_a_full_layer_raises_before_anything_is_written():
    layer = new_layer("retrieval", max_len=10)
    layer(*tokens(1, 9, 0))
    before = layer.k_cache.clone().view(torch.int32)  # bits: what no token has filled yet may be NaN
    with pytest.raises(RuntimeError, match="max_len is 10 tokens, 9 are held and 2 more were given"):
        layer(*tokens(1, 2, 1))
    assert layer.k_cache.view(torch.int32).equal(before) and layer.seq_lens.tolist() == [9]
    layer(*tokens(1, 1, 2))


def test_what_another_thread_compiles_changes_nothing_here(monkeypatch):
    """torch's flag is one for all threads. As seen from eager code, this layer would not grow and its tokens not be counted."""
    calls = [new_layer("retrieval", grow=True)(*tokens(1, 9, 0))]
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    layer = new_layer("retrieval", grow=True)
    calls.append(layer(*tokens(1, 9, 0)))
    assert calls[0].equal(calls[1])
    full = new_layer("retrieval", max_len=10)
    full(*tokens(1, 9, 0))
    with pytest.raises(RuntimeError, match="9 are held and 2 more"):
        full(*tokens(1, 2, 1))


def test_check_room_sees_steps_that_the_host_did_not_count():
    layer = new_layer("retrieval", max_len=10)
    layer.seq_lens.fill_(8)  # as compiled steps leave it
    layer.check_room(2)
    with pytest.raises(RuntimeError, match="8 are held and 3 more"):
        layer.check_room(3)
    with pytest.raises(RuntimeError, match="8 are held and 3 more"):
        layer(*tokens(1, 3, 0))


def test_a_failed_forward_is_not_counted():
    layer = new_layer("retrieval", max_len=10)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="must have the dtype of q"):
            layer(*tokens(1, 6, 0, torch.float64))
    layer(*tokens(1, 10, 1))
    with pytest.raises(RuntimeError, match="10 are held and 1 more"):
        layer(*tokens(1, 1, 2))


def test_padding_takes_no_room():
    layer, pad = new_layer("retrieval", max_len=10, max_batch=2), torch.tensor([4, 8], dtype=torch.int32)
    layer(*tokens(2, 9, 0), pad=pad)
    layer(*tokens(2, 5, 1))
    assert layer.seq_lens.tolist() == [10, 6]
    with pytest.raises(RuntimeError, match="10 are held and 1 more"):
        layer(*tokens(2, 1, 2))
    layer(*tokens(2, 1, 2), pad=torch.tensor([1, 0], dtype=torch.int32))
    assert layer.seq_lens.tolist() == [10, 7]


@every_kind
def test_pad_beyond_the_chunk_skips_the_whole_row(kind):
    layer, other = new_layer(kind, max_batch=2), new_layer(kind, max_batch=2)
    for q_len in (20, 3):
        given = tokens(2, q_len, q_len)
        out = layer(*given, pad=torch.tensor([-2, 30], dtype=torch.int32))
        assert out.equal(other(*given, pad=torch.tensor([0, q_len], dtype=torch.int32))) and not out[1].any()
    assert layer.seq_lens.tolist() == [23, 0]


@pytest.mark.parametrize("target", ["meta", pytest.param("cuda", marks=needs_cuda)])
def test_a_moved_layer_has_a_workspace_of_its_new_device(target):
    layer = new_layer("streaming", max_batch=2)
    assert layer.workspace.numel() == 0
    layer = torch.nn.Sequential(layer).to(target)[0]
    assert layer.workspace.device.type == target
    assert layer.workspace.numel() == zz.ops.new_workspace(target).numel() > 0
    address = layer.workspace.data_ptr()
    assert layer.to(torch.bfloat16).workspace.data_ptr() == address and layer.workspace.dtype == torch.uint8


@needs_cuda
def test_a_layer_moved_to_the_gpu_attends():
    layer = new_layer("retrieval").to("cuda", torch.bfloat16)
    here = new_layer("retrieval", device="cuda", dtype=torch.bfloat16)
    given = tokens(1, 9, 0, torch.bfloat16, "cuda")
    assert layer(*given).equal(here(*given))


def test_a_streaming_layer_never_fills():
    layer = new_layer("streaming", max_len=4)
    for step in range(40):
        layer(*tokens(1, 1, step))
    assert layer.k_cache.shape[2] == SINK + WINDOW


def test_buffers_are_not_saved_and_shown_in_repr():
    layer = new_layer("streaming")
    assert not layer.state_dict() and not list(layer.parameters())
    assert "streaming, sink=2, window=6, cache=(1, 2, 8, 64)" in repr(layer)


BAD = {
    "kind": ((4, 2, 64), {"kind": "full"}, "kind must be 'retrieval' or 'streaming', got 'full'"),
    "head_dim": (
        (4, 2, 48),
        {"kind": "retrieval", "max_len": 8},
        "head_dim must be one of 64, 80, .*, 512; got 48",
    ),
    "group": ((34, 2, 64), {"kind": "retrieval", "max_len": 8}, "1 to 16 times num_kv_heads; got 34 and 2"),
    "uneven_group": ((5, 2, 64), {"kind": "retrieval", "max_len": 8}, "got 5 and 2"),
    "max_len": ((4, 2, 64), {"kind": "retrieval"}, "needs max_len >= 1 tokens, got None"),
    "window": ((4, 2, 64), {"kind": "streaming", "sink": 4}, "got sink 4 and window 0"),
    "sink": ((4, 2, 64), {"kind": "streaming", "sink": -1, "window": 4}, "got sink -1 and window 4"),
    "dtype": ((4, 2, 64), {"kind": "retrieval", "max_len": 8, "dtype": torch.float64}, "float16 or bfloat16.*got torch.float64"),
    "max_batch": ((4, 2, 64), {"kind": "retrieval", "max_len": 8, "max_batch": 0}, "max_batch must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_raise(case):
    shape, options, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        zz.ZigzagAttention(*shape, **options)


@pytest.mark.parametrize("wrong", [{"sink": 2.0}, {"window": True}, {"window": "8"}, {"max_len": 8.5}], ids=str)
def test_token_counts_are_integers(wrong):
    with pytest.raises(TypeError, match="must be an integer number of tokens"):
        zz.ZigzagAttention(4, 2, 64, **{"kind": "streaming", "sink": 2, "window": 8} | wrong)


CALLS = {  # what is interrupted, on a layer of 2 rows x 12 tokens
    "step": lambda layer: layer(*tokens(2, 1, 1)),
    "new_tokens": lambda layer: layer(*tokens(2, 20, 1)),
    "padded": lambda layer: layer(*tokens(2, 20, 1), pad=torch.tensor([0, 3], dtype=torch.int32)),
    "one_row": lambda layer: layer(*tokens(1, 3, 1)),
    "check_room": lambda layer: layer.check_room(2),
    "reset": lambda layer: layer.reset(),
    "moved": lambda layer: layer.to(torch.bfloat16),
}
FILL_THE_RING = [CALLS[name] for name in ("new_tokens", "padded", "one_row")]


@pytest.mark.parametrize("places,stride", [({"own": True}, 1), ({"opcodes": True}, 13)], ids=["line", "instruction"])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", [{"kind": "streaming"}, {"kind": "retrieval"}, {"kind": "retrieval", "grow": True}], ids=str)
def test_an_interrupt_at_any_place_leaves_a_layer_as_before_or_behind_the_call(options, call, places, stride):
    """Or it says that only `reset()` helps, which a ring may; and `max_len` stays the limit."""
    start = new_layer(**options, max_batch=2)
    start(*tokens(2, 12, 0))
    done = copy.deepcopy(start)
    counted = Places(**places)
    assert not counted.run(lambda: CALLS[call](done))
    expected = {(each.store.dtype, *each.seq_lens.tolist()): each for each in (start, done)}
    expected = {state: next_output(copy.deepcopy(each)) for state, each in expected.items()}
    marked = 0
    for at in range(1, counted.count + 1, stride):
        layer = copy.deepcopy(start)
        Places(at, **places).run(lambda layer=layer: CALLS[call](layer))
        state = (layer.store.dtype, *layer.seq_lens.tolist())
        try:
            assert next_output(layer).equal(expected[state])
        except RuntimeError as error:
            assert "call reset()" in str(error)
            layer.reset()
            layer(*tokens(2, 12, 0))
            assert next_output(layer).equal(expected[state[0], 12, 12])
            marked += 1
        if options["kind"] == "retrieval":
            room = 64 - max(layer.seq_lens.tolist())
            with pytest.raises(RuntimeError, match="max_len is 64 tokens"):
                next_output(layer, room + 1)
            next_output(layer, room)
    assert counted.count > 5 and marked <= (counted.count if CALLS[call] in FILL_THE_RING and layer.window else 0)


def next_output(layer, q_len=1):
    return layer(*tokens(2, q_len, 9, layer.store.dtype))


def test_compiled_code_refuses_a_layer_that_an_interrupt_left_open():
    layer = new_layer("streaming")
    layer(*tokens(1, 12, 0))
    behind_append = lambda at: Places(at, own=True).run(lambda: layer(*tokens(1, 20, 1)))  # noqa: E731
    assert any(behind_append(at) and layer._open for at in range(1, 100))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(Exception, match="call check_room.. or reset"):
        compiled(*tokens(1, 1, 2))
    with pytest.raises(RuntimeError, match=r"20 tokens was interrupted.*call reset\(\)"):
        layer.check_room()
    layer.reset()
    with torch.no_grad():
        assert compiled(*tokens(1, 1, 2)).shape == (1, HEADS, 1, HEAD_DIM)
