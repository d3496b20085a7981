"""Growing buffers: fixed addresses, contents kept, memory given and taken, failures whole, and the kernels over them."""

import gc
import weakref

import pytest
import torch
from gpu import needs_cuda

from zigzag_ext import _C, ops
from zigzag_ext.virtual import GrowingBuffer

TERABYTE = 1 << 40


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_cuda)])
def where(request):
    return request.param


def growing(where, batch=2, max_slots=1 << 31, dtype=torch.bfloat16):
    """2 rows x 2^31 slots x 2 heads x 64 x 2 bytes: a terabyte of addresses."""
    return GrowingBuffer(batch, 2, max_slots, 64, dtype, where)


def test_a_terabyte_costs_nothing_until_it_is_used(where):
    buffer = growing(where)
    assert buffer.tensor.shape == (2, 2, 1 << 31, 64) and buffer.tensor.device.type == where
    assert buffer.tensor.untyped_storage().nbytes() >= TERABYTE
    page = buffer._buffer.page_bytes
    assert buffer.memory_bytes <= 2 * page and buffer.slots == 0
    buffer.commit(1)
    assert buffer.memory_bytes == 2 * page
    buffer.commit(3 * page // 256 + 1)  # 256 bytes a slot
    assert buffer.memory_bytes == 2 * 4 * page


def test_growth_keeps_addresses_and_contents(where):
    buffer = growing(where)
    address, rows = buffer.tensor.data_ptr(), torch.randn(2, 2, 5000, 64).to(torch.bfloat16)
    for slots in (1, 700, 5000):
        before = buffer.slots
        buffer.commit(slots)
        buffer.tensor[:, :, before:slots] = rows[:, :, before:slots].to(where)
        assert buffer.tensor.data_ptr() == address and buffer.slots == slots
        assert torch.equal(buffer.tensor[:, :, :slots].cpu(), rows[:, :, :slots])
    buffer.commit(10)
    assert buffer.slots == 5000


def test_release_gives_the_memory_back(where):
    buffer = growing(where)
    address = buffer.tensor.data_ptr()
    buffer.commit(100_000)
    buffer.tensor[:, :, :100_000] = 1
    buffer.release()
    assert buffer.memory_bytes == 0 and buffer.slots == 0
    buffer.commit(8)
    buffer.tensor[:, :, :8] = 2
    assert buffer.tensor.data_ptr() == address and buffer.tensor[:, :, :8].eq(2).all()


def test_out_of_memory_leaves_the_buffer_as_it_was(where):
    buffer = growing(where, max_slots=1 << 35)  # 16 terabytes
    buffer.commit(300)
    buffer.tensor[:, :, :300] = 3
    held = buffer.memory_bytes
    with pytest.raises(MemoryError, match=r"out of memory: the buffer grows by \d+ bytes, .*\d+ bytes are free"):
        buffer.commit(1 << 35)
    assert buffer.memory_bytes == held and buffer.slots == 300
    assert buffer.tensor[:, :, :300].eq(3).all()


def test_the_tensor_keeps_the_memory_alive(where):
    buffer = growing(where)
    buffer.commit(4)
    tensor, alive = buffer.tensor, weakref.ref(buffer)
    tensor[:, :, :4] = 5
    del buffer
    gc.collect()
    assert alive() is None and tensor[:, :, :4].eq(5).all()


@pytest.mark.parametrize("window", [0, 7])
def test_attention_over_a_growing_cache_is_attention(where, window):
    """The kernels append to and read the strided, half-committed tensor as they do a plain one."""
    torch.manual_seed(0)
    dtype, slots = torch.bfloat16, 3 + window if window else 1 << 20
    keys, values = (GrowingBuffer(2, 2, slots, 64, dtype, where) for _ in range(2))
    seen = torch.zeros(2, dtype=torch.int32, device=where)
    plain = [torch.zeros(2, 2, 10 if window else 60, 64, dtype=dtype, device=where) for _ in range(2)]
    held = 0
    for q_len in (1, 20, 3, 1):
        held += q_len
        for buffer in (keys, values):
            buffer.commit(min(held, slots))
        q, k, v = (torch.randn(2, heads, q_len, 64).to(where, dtype) for heads in (4, 2, 2))
        out, lse = ops.attention(q, k, v, keys.tensor, values.tensor, seen, sink=3 if window else 0, window=window)
        expected, expected_lse = ops.attention(q, k, v, *plain, seen, sink=3 if window else 0, window=window)
        assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
        seen += q_len
    used = min(held, plain[0].shape[2])
    for buffer, cache in zip((keys, values), plain, strict=True):
        assert torch.equal(buffer.tensor[:, :, :used], cache[:, :, :used])


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: GrowingBuffer(1, 2, 0, 64, torch.bfloat16, "cpu"), ValueError, r"at least 1, got \(1, 2, 0, 64\)"),
        (lambda: GrowingBuffer(1, 2, 8, 64, torch.bfloat16, "meta"), ValueError, "cpu or cuda, got meta"),
        (lambda: GrowingBuffer(1, 2, 1 << 53, 64, torch.bfloat16, "cpu"), ValueError, r"at most 2\^60 bytes"),
        (lambda: GrowingBuffer(1, 2, 1 << 50, 64, torch.bfloat16, "cpu"), ValueError, "cannot reserve"),
        (lambda: growing("cpu").commit(-1), ValueError, "commit takes 0 to 2147483648 slots, got -1"),
        (lambda: growing("cpu").commit((1 << 31) + 1), ValueError, "got 2147483649"),
        (lambda: _C.VirtualBuffer(0, 4), ValueError, "rows >= 1"),
        (lambda: _C.VirtualBuffer(1, 4, 1000), ValueError, "no CUDA|device"),
        (lambda: _C.VirtualBuffer(1, 4).__cuda_array_interface__, AttributeError, "on the CPU"),
    ],
    ids=["empty", "meta", "wraps", "addresses", "negative", "beyond", "rows", "device", "interface"],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_repr():
    buffer = _C.VirtualBuffer(2, 5000)
    buffer.commit(1)
    page = buffer.page_bytes
    assert repr(buffer) == f"VirtualBuffer(2 rows of 5000 bytes on cpu, {2 * page} of {2 * buffer.row_stride} bytes committed)"


@needs_cuda
def test_a_captured_graph_survives_growth():
    buffer = growing("cuda")
    buffer.commit(16)
    buffer.tensor[:, :, :16] = 1
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        buffer.tensor[:, :, :16].add_(1)
    buffer.commit(1_000_000)
    buffer.tensor[:, :, 999_999] = 9
    graph.replay()
    assert buffer.tensor[:, :, :16].eq(2).all() and buffer.tensor[:, :, 999_999].eq(9).all()


@needs_cuda
def test_memory_that_torch_keeps_is_asked_back():
    free = torch.cuda.mem_get_info()[0]
    kept = torch.empty(free * 3 // 4, dtype=torch.uint8, device="cuda")
    del kept  # freed, but still torch's
    buffer = growing("cuda", batch=1)
    buffer.commit(free // 2 // 256)
    assert buffer.memory_bytes >= free // 2 - 256
    buffer.release()
