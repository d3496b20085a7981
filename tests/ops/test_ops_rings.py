"""Rings with slack: tokens written and taken back leave what later queries see, and nothing outside the window is read."""

import pytest
import torch
from op_cases import FLOOR, relative_error
from quant_cases import garbage, is_served

from zigzag_ext.attention import ops, reference
from zigzag_ext.attention.buffers import GrowingBuffer

HEADS, GROUP, HEAD_DIM = 2, 2, 64
SHAPES = [(0, 4, 3), (2, 5, 1), (3, 16, 7), (5, 1, 2), (4, 7, 0), (2, 3, 18)]  # sink, window, slack
NAMES = ("k_cache", "v_cache", "k_scale", "v_scale")


class Rings:
    """One row for every length over two wraps, each holding the first tokens of one history; slots outside the window are NaN."""

    def __init__(self, sink: int, window: int, slack: int, kv_format: str, dtype: torch.dtype, device: str):
        self.layout = {"sink": sink, "window": window}
        self.slots, self.kv_format, self.dtype, self.device = sink + window + slack, kv_format, dtype, device
        self.lengths = list(range(sink + 2 * (window + slack) + 3))
        self.rng = torch.Generator().manual_seed(sink * 100 + window)
        batch = len(self.lengths)
        buffers = [ops.new_cache(batch, HEADS, self.slots, HEAD_DIM, dtype, device, kv_format) for _ in "kv"]
        self.held = dict(zip(NAMES, (buffers[0][0], buffers[1][0], buffers[0][1], buffers[1][1]), strict=True))
        longest = max(self.lengths)
        history = [self.tokens(longest, HEADS, 1).expand(batch, -1, -1, -1) for _ in "kv"]
        for row, length in enumerate(self.lengths):  # left-aligned histories are appended row by row
            own = [h[row : row + 1, :, :length] for h in history]
            caches = {name: t if t is None else t[row : row + 1] for name, t in self.held.items()}
            ops.append(*own, seq_lens=torch.zeros(1, dtype=torch.int32, device=device), **caches, **self.layout)
        self.seq_lens = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        for row in range(batch):
            unseen = reference.position_of(self.slots, self.lengths[row], **self.layout) < 0
            for name in ("k", "v"):
                if kv_format == "none":
                    self.held[f"{name}_cache"][row][:, unseen] = torch.nan
                else:
                    garbage(self.held[f"{name}_cache"], self.held[f"{name}_scale"], unseen, row)

    def tokens(self, count: int, heads: int, batch: int) -> torch.Tensor:
        return torch.randn(batch, heads, count, HEAD_DIM, generator=self.rng).to(self.dtype).to(self.device)

    def seen(self, after: int = 0) -> torch.Tensor:
        """[batch, slots] whether the next query sees the slot, once `after` more tokens are held."""
        rows = []
        for length in (n + after for n in self.lengths):
            held = reference.position_of(self.slots, length, **self.layout)
            rows.append((held >= 0) & reference.visible(held, torch.tensor(length), **self.layout))
        return torch.stack(rows).to(self.device)

    def chunk(self, count: int) -> tuple[torch.Tensor, ...]:
        batch = len(self.lengths)
        return tuple(self.tokens(count, heads, batch) for heads in (HEADS * GROUP, HEADS, HEADS))


def copy(caches: dict) -> dict:
    return {name: t if t is None else t.clone() for name, t in caches.items()}


def same_where(seen: torch.Tensor, caches: dict, others: dict) -> bool:
    """Whether the slots `seen` [batch, slots] hold the same bits."""
    for name, t in caches.items():
        if t is None:
            continue
        a, b = (x[name].contiguous().view(torch.uint8).reshape(*x[name].shape[:3], -1) for x in (caches, others))
        if ((a != b).any(-1) & seen[:, None]).any():
            return False
    return True


def specification(rings: Rings, caches: dict, new: tuple) -> torch.Tensor:
    wide = {name: t if t is None else t.cpu() for name, t in copy(caches).items()}
    if rings.kv_format == "none":
        wide = {name: t if t is None else t.double() for name, t in wide.items()}
    return reference.attention(*(t.cpu().double() for t in new), seq_lens=rings.seq_lens.cpu(), **wide, **rings.layout)[0]


@pytest.mark.parametrize("kv_format", ["none", "fp8", "int8", "int4"])
@pytest.mark.parametrize("sink,window,slack", SHAPES)
@pytest.mark.parametrize("one_call", [False, True])
def test_tokens_taken_back_leave_no_trace(device, sink, window, slack, kv_format, one_call):
    """Every length, 1 to slack + 1 drafts, one by one or in one call; then calls of 1, 3 and 20 tokens."""
    dtype, limit = (torch.float32, 8e-5) if device == "cpu" else (torch.bfloat16, 1.6e-2)
    rings = Rings(sink, window, slack, kv_format, dtype, device)
    for drafts in {1, slack // 2 + 1, slack + 1}:
        drafted, untouched = copy(rings.held), rings.held
        for step in range(1 if one_call else drafts):
            new = rings.chunk(drafts if one_call else 1)
            ops.attention(*new, seq_lens=rings.seq_lens + step, **drafted, **rings.layout)
        assert same_where(rings.seen(), drafted, untouched), f"{drafts} drafts"
        for count in (1, 3, 20):
            new, after, plain = rings.chunk(count), copy(drafted), copy(untouched)
            out = ops.attention(*new, seq_lens=rings.seq_lens, **after, **rings.layout)
            want = ops.attention(*new, seq_lens=rings.seq_lens, **plain, **rings.layout)
            assert torch.equal(out[0], want[0]) and torch.equal(out[1], want[1])
            assert same_where(rings.seen(count), after, plain), f"{drafts} drafts, then {count}"
            if drafts == slack + 1:
                error = relative_error(out[0].cpu(), specification(rings, untouched, new))
                assert error <= limit, (count, error)


@pytest.mark.parametrize("window", [5, 100, 1000])
@pytest.mark.parametrize("q_len", [1, 4, 16, 40])
def test_a_window_over_a_full_cache_is_a_ring(device, dtype, window, q_len):
    """Slot = position: the queries of a ring of sink + window slots, whatever else the buffer holds."""
    sink, lengths = 4, (0, 3, 50, 900)
    rng = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(4, HEADS, 960, HEAD_DIM, generator=rng).to(dtype).to(device) for _ in "kv")
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    ring = [torch.full((4, HEADS, sink + window, HEAD_DIM), torch.nan, dtype=dtype, device=device) for _ in "kv"]
    slots = max(960, sink + window)
    buffer = [torch.full((4, HEADS, slots, HEAD_DIM), torch.nan, dtype=dtype, device=device) for _ in "kv"]
    for row, length in enumerate(lengths):
        own, zero = (t[row : row + 1, :, :length] for t in (keys, values)), torch.zeros(1, dtype=torch.int32, device=device)
        own = tuple(own)
        ops.append(*own, *(t[row : row + 1] for t in ring), zero, sink=sink, window=window)
        ops.append(*own, *(t[row : row + 1] for t in buffer), zero)
        for t in buffer:
            t[row, :, sink : max(sink, length - window)] = torch.nan
    new = [torch.randn(4, h, q_len, HEAD_DIM, generator=rng).to(dtype).to(device) for h in (HEADS * GROUP, HEADS, HEADS)]
    want = ops.attention(*new, *ring, seq_lens, sink=sink, window=window)
    out = ops.attention(*new, *buffer, seq_lens, sink=sink, window=window)
    assert relative_error(out[0].cpu(), want[0].cpu().double()) <= 4 * FLOOR[dtype]
    torch.testing.assert_close(out[1], want[1], atol=2e-3, rtol=1e-4)
    for row, length in enumerate(lengths):
        for t, tokens in zip(buffer, new[1:], strict=True):
            assert torch.equal(t[row, :, length : length + q_len], tokens[row]), "slot = position"


@pytest.mark.parametrize("q_len", [1, 5, 40])
def test_slots_outside_the_window_need_no_memory(device, dtype, q_len):
    """A window over a buffer that has memory for its tokens only: a slot beyond them is an address without any."""
    row_bytes, length = HEADS * HEAD_DIM * dtype.itemsize, 5000
    buffers = [GrowingBuffer(1, HEADS, (1 << 32) // row_bytes, HEAD_DIM, dtype, torch.device(device)) for _ in "kv"]
    for buffer in buffers:
        buffer.commit(length + q_len)
    rng = torch.Generator().manual_seed(2)
    keys, values = (torch.randn(1, HEADS, length, HEAD_DIM, generator=rng).to(dtype).to(device) for _ in "kv")
    tensors, zero = [buffer.tensor for buffer in buffers], torch.zeros(1, dtype=torch.int32, device=device)
    ops.append(keys, values, *tensors, zero)
    new = [torch.randn(1, h, q_len, HEAD_DIM, generator=rng).to(dtype).to(device) for h in (HEADS * GROUP, HEADS, HEADS)]
    ring = [torch.empty(1, HEADS, 104, HEAD_DIM, dtype=dtype, device=device) for _ in "kv"]
    ops.append(keys, values, *ring, zero, sink=4, window=100)
    out, _ = ops.attention(*new, *tensors, zero + length, sink=4, window=100)
    want, _ = ops.attention(*new, *ring, zero + length, sink=4, window=100)
    assert relative_error(out.cpu(), want.cpu().double()) <= 4 * FLOOR[dtype]


def test_fewer_slots_than_the_window_are_refused(device, dtype):
    new, cache = torch.zeros(1, 2, 1, 64, dtype=dtype, device=device), torch.zeros(1, 2, 11, 64, dtype=dtype, device=device)
    lengths = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=r"at least sink \+ window = 12 slots, the cache has 11"):
        ops.attention(new, new, new, cache, cache.clone(), lengths, sink=4, window=8)
    ops.attention(new, new, new, cache, cache.clone(), lengths, sink=3, window=8)
    ops.attention(new, new, new, cache, cache.clone(), lengths, sink=2, window=8)


def test_formats_on_this_device(device):
    """The formats that the tests above run are those with kernels for rings."""
    assert all(is_served(device, (f, f), 1) for f in ("fp8", "int8", "int4"))
