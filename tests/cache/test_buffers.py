"""Growing buffers: fixed addresses, contents kept, memory given and taken, failures whole, and the kernels over them."""

import gc
import weakref

import pytest
import torch
from gpu import needs_cuda

from zigzag_ext import _C
from zigzag_ext.attention import ops
from zigzag_ext.attention.buffers import GrowingBuffer

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
    assert buffer.memory_bytes == 2 * page  # on CUDA too: 2048 slots that a kernel may read are less than a page
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
    with pytest.raises(MemoryError, match=r"out of memory: the buffer grows by \d+ bytes, .* \d+ bytes are free now"):
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


@pytest.mark.parametrize("batch, num_kv_heads, head_dim", [(1, 8, 256), (2, 2, 64), (1, 5, 80), (40, 1, 64)], ids=str)
def test_attention_touches_committed_memory_only(where, batch, num_kv_heads, head_dim):
    """Appends to and reads a tensor that is committed to the last token as it does a plain one. 8 x 256 bf16 is a CPU page."""
    torch.manual_seed(0)
    dtype, plain_slots = torch.bfloat16, 60
    keys, values = (GrowingBuffer(batch, num_kv_heads, 1 << 20, head_dim, dtype, where) for _ in range(2))
    plain = [torch.zeros(batch, num_kv_heads, plain_slots, head_dim, dtype=dtype, device=where) for _ in range(2)]
    lengths = torch.zeros(batch, dtype=torch.int32, device=where)
    held = 0
    for q_len in (1, 15, 20, 3, 1, 1):
        held += q_len
        for buffer in (keys, values):
            buffer.commit(held)
        heads = (2 * num_kv_heads, num_kv_heads, num_kv_heads)
        q, k, v = (torch.randn(batch, h, q_len, head_dim).to(where, dtype) for h in heads)
        out, lse = ops.attention(q, k, v, keys.tensor, values.tensor, lengths)
        expected, expected_lse = ops.attention(q, k, v, *plain, lengths)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)
        lengths += q_len
    for buffer, cache in zip((keys, values), plain, strict=True):
        assert torch.equal(buffer.tensor[:, :, :held], cache[:, :, :held])


@needs_cuda
@pytest.mark.parametrize("num_kv_heads, head_dim", [(8, 128), (16, 256), (5, 80), (1, 64)], ids=str)
def test_attention_at_the_last_slot_of_a_page(num_kv_heads, head_dim):
    """Keys up to the end of the committed memory and one short of it, where the next slot has none."""
    keys, values = (GrowingBuffer(1, num_kv_heads, 1 << 24, head_dim, torch.bfloat16, "cuda") for _ in range(2))
    q, k, v = (torch.randn(1, heads, 1, head_dim).to("cuda", torch.bfloat16) for heads in (4 * num_kv_heads, *[num_kv_heads] * 2))
    page = keys._buffer.page_bytes // (num_kv_heads * head_dim * 2)
    for held in (1, page - 1, page, page + 1, 2 * page, 5 * page):
        for buffer in (keys, values):
            before = buffer.slots
            buffer.commit(held)
            buffer.tensor[:, :, before:held].normal_()
        lengths = torch.tensor([held - 1], dtype=torch.int32, device="cuda")
        out, _ = ops.attention(q, k, v, keys.tensor, values.tensor, lengths)
        plain = [buffer.tensor[:, :, :held].contiguous() for buffer in (keys, values)]
        torch.testing.assert_close(out, ops.attention(q, k, v, *plain, lengths)[0], atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize(
    "length, batch, heads, slots", [(1, 1, 8, 2048), (2621, 1, 5, 2624), (17, 32, 8, 32), (4096, 1, 8, 4096)]
)
def test_readable_slots(length, batch, heads, slots):
    """Whole tiles of 16, and the read-ahead of the clusters that small batches run in."""
    assert _C.readable_slots(length, batch, heads) == slots


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
        (lambda: _C.VirtualBuffer(1, 4, 1000), ValueError, "no CUDA|CUDA error|device"),
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
