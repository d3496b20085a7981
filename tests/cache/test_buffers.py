"""Growing buffers: fixed addresses, contents kept, memory given and taken, failures whole, and the kernels over them."""

import copy
import ctypes
import gc
import io
import pickle
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


def numbers(buffer, slots, row=slice(None)):
    """Writes different numbers into the first slots and returns them."""
    shape = buffer.tensor[row, :, :slots].shape
    values = torch.randn(shape).to(buffer.dtype)
    buffer.tensor[row, :, :slots] = values.to(buffer.device)
    return values


def forbid_reading(buffer):
    """On the CPU what has no memory reads as zeros; here it becomes a crash, as on CUDA."""
    if buffer.device.type == "cpu":
        memory = buffer._buffer
        for row in range(buffer.batch):
            held = memory.committed_row_bytes(row)
            address = memory.data_ptr + row * memory.row_stride + held
            rest = ctypes.c_void_p(address), ctypes.c_size_t(memory.row_stride - held)
            assert ctypes.CDLL(None).mprotect(*rest, 0) == 0


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
            forbid_reading(buffer)
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


def test_rows_grow_and_go_alone(where):
    buffer = growing(where, batch=3)
    page = buffer._buffer.page_bytes
    slots = page // 256  # of a page: 256 bytes a slot
    first = buffer.memory_bytes  # on CUDA a page of row 0, from the start
    buffer.commit_row(1, slots + 1)
    assert buffer.row_slots == (0, slots + 1, 0) and buffer.slots == 0
    pages = -(-_C.readable_slots(slots + 1, 3, 2) // slots) if where == "cuda" else 2
    assert buffer.memory_bytes - first == pages * page
    buffer.commit(2)
    assert buffer.row_slots == (2, slots + 1, 2) and buffer.memory_bytes == (pages + 2) * page
    kept, alone = numbers(buffer, 2), numbers(buffer, slots + 1, slice(1, 2))
    kept[1] = alone[0, :, :2]
    buffer.release_row(0)
    assert buffer.memory_bytes == (pages + 1) * page and buffer.row_slots == (0, slots + 1, 2)
    assert torch.equal(buffer.held(row=1).cpu(), alone) and torch.equal(buffer.held(row=2).cpu(), kept[2:])
    buffer.release_row(1)
    assert buffer.memory_bytes == page and torch.equal(buffer.held(row=2).cpu(), kept[2:])
    buffer.commit_row(0, 2)
    assert torch.equal(numbers(buffer, 2, slice(0, 1)), buffer.held(row=0).cpu())
    assert torch.equal(buffer.held(row=2).cpu(), kept[2:]) and buffer.memory_bytes == 2 * page


@pytest.mark.parametrize("head_dim", [64, None])
def test_a_row_is_copied_within_what_both_have(where, head_dim):
    buffer = GrowingBuffer(3, 2, 5000, head_dim, torch.float32, where)
    buffer.commit_row(0, 700), buffer.commit_row(2, 300)
    first, last = numbers(buffer, 700, slice(0, 1)), numbers(buffer, 300, slice(2, 3))
    buffer.copy_row(0, 2, 100)
    last[:, :, :100] = first[:, :, :100]
    assert torch.equal(buffer.held(row=2).cpu(), last) and torch.equal(buffer.held(row=0).cpu(), first)
    for source, row, slots in ((0, 2, 301), (0, 1, 1), (0, 2, -1)):
        with pytest.raises(ValueError, match=rf"slots are committed in rows 0 and {row}, {slots} were to be copied"):
            buffer.copy_row(source, row, slots)
    with pytest.raises(ValueError, match="rows 0 to 2, got 3"):
        buffer.copy_row(0, 3, 1)


def test_shrinking_gives_pages_back_and_keeps_the_rest(where):
    buffer = growing(where)
    page = buffer._buffer.page_bytes
    slots = page // 256
    buffer.commit(9 * slots)
    before, values = buffer.memory_bytes, numbers(buffer, 9 * slots)
    buffer.shrink(2 * slots)
    assert buffer.slots == 2 * slots and 2 * 2 * page <= buffer.memory_bytes < before - 2 * 4 * page
    assert torch.equal(buffer.held().cpu(), values[:, :, : 2 * slots])
    buffer.shrink(5, row=1)
    assert buffer.row_slots == (2 * slots, 5) and buffer.held(5).shape == (2, 2, 5, 64)
    buffer.shrink(3 * slots)  # more than is held
    assert buffer.row_slots == (2 * slots, 5)
    buffer.commit(9 * slots)
    assert torch.equal(buffer.tensor[:, :, :5].cpu(), values[:, :, :5])


@pytest.mark.parametrize("head_dim", [64, None])
def test_an_extended_buffer_keeps_what_it_holds(where, head_dim):
    buffer = GrowingBuffer(3, 2, 5000, head_dim, torch.float32, where)
    for row, slots in enumerate((700, 0, 5000)):
        buffer.commit_row(row, slots)
    values = [numbers(buffer, slots, slice(row, row + 1)) for row, slots in enumerate(buffer.row_slots)]
    old, held = buffer.tensor, buffer.memory_bytes
    buffer.extend(1_000_000)
    assert buffer.max_slots == 1_000_000 and buffer.tensor.shape[:3] == (3, 2, buffer.tensor.shape[2])
    assert buffer.tensor.shape[2] >= 1_000_000 and buffer.tensor.data_ptr() != old.data_ptr()
    assert buffer.row_slots == (700, 0, 5000) and buffer.memory_bytes == held
    assert all(torch.equal(buffer.held(row=row).cpu(), values[row]) for row in range(3))
    if where == "cpu":
        assert not old.any(), "an old address reads as zeros"
    buffer.commit(9000)
    assert torch.equal(buffer.tensor[2:, :, :5000].cpu(), values[2])
    buffer.extend(10)
    assert buffer.max_slots == 1_000_000


def test_what_is_shown_is_a_copy_of_what_is_held(where):
    buffer = growing(where)
    assert buffer.held().shape == (2, 2, 0, 64)
    buffer.commit(7)
    values = numbers(buffer, 7)
    shown = buffer.held()
    assert type(shown) is torch.Tensor and shown.untyped_storage().nbytes() == values.nbytes
    buffer.release()
    assert torch.equal(shown.cpu(), values) and buffer.held().numel() == 0
    file = io.BytesIO()
    torch.save(shown, file)
    assert file.tell() < values.nbytes + 10_000
    with pytest.raises(ValueError, match="0 slots are committed, 3 were asked for"):
        buffer.held(3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))], ids=["deepcopy", "pickle"])
def test_a_copy_holds_what_is_committed(where, copied):
    buffer = growing(where)
    buffer.commit_row(1, 300)
    values = numbers(buffer, 300, slice(1, 2))
    other = copied(buffer)
    assert other.row_slots == (0, 300) and other.max_slots == buffer.max_slots and other.tensor.shape == buffer.tensor.shape
    assert other.tensor.data_ptr() != buffer.tensor.data_ptr()
    buffer.tensor[1, :, :300] = 0
    assert torch.equal(other.held(row=1).cpu(), values)


@pytest.mark.parametrize(
    "use",
    [
        copy.copy,
        copy.deepcopy,
        pickle.dumps,
        lambda t: torch.save(t, io.BytesIO()),
        lambda t: t.share_memory_(),
        lambda t: t.tolist(),
    ],
    ids=["copy", "deepcopy", "pickle", "save", "share", "list"],
)
def test_all_of_a_buffer_is_refused_where_it_would_be_read(where, use):
    buffer = growing(where)
    with pytest.raises(TypeError, match=r"addresses for \[2, 2, 2147483648, 64\] .* most of it has no memory"):
        use(buffer.tensor)
    assert "GrowingBuffer.held() copies what has memory" in repr(vars(buffer)) + str(buffer.tensor) + f"{buffer.tensor}"


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
        (
            lambda: GrowingBuffer(1, 2, 1 << 63, 64, torch.bfloat16, "cpu"),
            ValueError,
            r"at most 2\^60 bytes, got 9223372036854775808",
        ),
        (lambda: GrowingBuffer(1, 2, 1 << 50, 64, torch.bfloat16, "cpu"), ValueError, "cannot reserve"),
        (lambda: growing("cpu").commit(-1), ValueError, "commit takes 0 to 2147483648 slots, got -1"),
        (lambda: growing("cpu").commit((1 << 31) + 1), ValueError, "got 2147483649"),
        (lambda: growing("cpu").commit_row(2, 1), ValueError, "rows 0 to 1, got 2"),
        (lambda: growing("cpu").release_row(-1), ValueError, "rows 0 to 1, got -1"),
        (lambda: growing("cpu").held(row=7), ValueError, "rows 0 to 1, got 7"),
        (lambda: growing("cpu").shrink(-3), ValueError, "shrink takes 0 to 2147483648 slots, got -3"),
        (lambda: growing("cpu").extend(1 << 60), ValueError, r"at most 2\^60 bytes"),
        (lambda: _C.VirtualBuffer(0, 4), ValueError, "rows >= 1"),
        (lambda: _C.VirtualBuffer(2, 4).commit_row(2, 1), ValueError, "rows 0 to 1, got 2"),
        (lambda: _C.VirtualBuffer(2, 5000).extended(4), ValueError, "at least its 5000 bytes"),
        (lambda: _C.VirtualBuffer(1, 4, 1000), ValueError, "no CUDA|CUDA error|device"),
        (lambda: _C.VirtualBuffer(1, 4).__cuda_array_interface__, AttributeError, "on the CPU"),
    ],
    ids=[
        "empty",
        "meta",
        "wraps",
        "overflows",
        "addresses",
        "negative",
        "beyond",
        "row",
        "row_back",
        "held",
        "shrink",
        "extend",
        "rows",
        "core_row",
        "shorter",
        "device",
        "interface",
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_repr():
    buffer = _C.VirtualBuffer(2, 5000)
    buffer.commit(1)
    page = buffer.page_bytes
    assert repr(growing("cpu")) == "GrowingBuffer([2, 2, 0, 64] torch.bfloat16 on cpu, at most 2147483648 slots, 0 bytes)"
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
def test_memory_that_torch_keeps_is_asked_back(gpu_memory):
    free = torch.cuda.mem_get_info()[0]
    kept = torch.empty(free * 3 // 4, dtype=torch.uint8, device="cuda")
    del kept  # freed, but still torch's
    buffer = growing("cuda", batch=1)
    buffer.commit(free // 2 // 256)
    assert buffer.memory_bytes >= free // 2 - 256
    buffer.release()


@needs_cuda
@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_a_capture_survives_that_buffers_go(mode, gpu_memory):
    """Giving memory back waits for the device, which would invalidate the capture: it happens later.

    Of gigabytes: other tests take less meanwhile.
    """
    dying, live, shown = growing("cuda"), growing("cuda"), torch.zeros(4, device="cuda")
    dying.commit(8 << 20)
    live.commit(8 << 20)
    taken, free = dying.memory_bytes, torch.cuda.mem_get_info()[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=mode):
        shown.add_(1)
        del dying
        gc.collect()
        live.release()
        live.commit(8)
    assert live.memory_bytes >= taken - 2 * live._buffer.page_bytes, "the memory is kept while the capture is under way"
    live.release()
    assert torch.cuda.mem_get_info()[0] >= free + 2 * taken - taken // 2
    graph.replay()
    assert shown.eq(1).all()


@needs_cuda
def test_an_extended_buffer_takes_no_memory_twice(gpu_memory):
    buffer = growing("cuda", batch=1, max_slots=1 << 22)
    slots = torch.cuda.mem_get_info()[0] * 6 // 10 // 256
    buffer.extend(slots)
    buffer.commit(slots)
    buffer.tensor[:, :, slots - 1] = 3
    buffer.extend(2 * slots)
    assert buffer.tensor[:, :, slots - 1].eq(3).all()
