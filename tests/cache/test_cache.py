"""ZigzagCache by itself, without a model: buffers, lengths, growth, row operations, and what it reports."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig  # noqa: E402

import zigzag_ext as zz  # noqa: E402
from zigzag_ext.attention import reference  # noqa: E402
from zigzag_ext.attention.buffers import GrowingBuffer  # noqa: E402

KINDS, SINK, WINDOW, HEAD_DIM = ("retrieval", "streaming"), 2, 6, 64
CONFIG = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=256)


def new_cache(kinds=KINDS, max_len=None):
    config = CONFIG if len(kinds) == 2 else LlamaConfig(num_hidden_layers=len(kinds))
    return zz.ZigzagCache(config, zz.Plan(kinds, sink=SINK, window=WINDOW), max_len)


class Stream:
    """Random queries, keys and values per layer, and the reference caches that saw the same tokens."""

    def __init__(self, cache, batch, seed=0):
        self.cache, self.generator, self.batch = cache, torch.Generator().manual_seed(seed), batch
        self.seq_lens = torch.zeros(batch, dtype=torch.int32)
        self.buffers = [
            tuple(torch.full((batch, 2, SINK + WINDOW if layer.window else 4096, HEAD_DIM), torch.nan) for _ in "kv")
            for layer in cache.layers
        ]

    def feed(self, q_len, mask=None, pad=None):
        """One forward through both; the outputs must agree."""
        with self.cache.forward(self.batch, q_len, mask):
            for layer, (keys, values) in zip(self.cache.layers, self.buffers, strict=True):
                q, k, v = (torch.randn(self.batch, h, q_len, HEAD_DIM, generator=self.generator) for h in (4, 2, 2))
                assert layer.update(k, v)[0] is k, "update copies nothing"
                out = layer.attend(q, k, v, 0.125)
                ring = {"sink": layer.sink, "window": layer.window}
                expected, _ = reference.attention(q, k, v, keys, values, self.seq_lens, pad=pad, **ring, scale=0.125)
                torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-5)
        self.seq_lens += q_len if pad is None else q_len - pad
        assert self.cache.seq_lens.equal(self.seq_lens)

    def keep_rows(self, index):
        self.batch, self.seq_lens = len(index), self.seq_lens[index]
        self.buffers = [(keys[index], values[index]) for keys, values in self.buffers]


@pytest.mark.parametrize(
    "chunks", [[1] * 30, [20, 1, 1, 9, 1], [5, 40, 3, 17, 1]], ids=lambda chunks: "_".join(map(str, chunks[:5]))
)
def test_every_chunking_matches_the_reference(chunks):
    stream = Stream(new_cache(), batch=2)
    for q_len in chunks:
        stream.feed(q_len)
    assert stream.cache.get_seq_length() == sum(chunks)


def test_left_padding_over_several_chunks():
    stream, padding = Stream(new_cache(), batch=3), torch.tensor([0, 3, 20])
    mask = (torch.arange(40) >= padding[:, None]).long()
    seen = 0
    for q_len in (18, 8, 1, 13):
        seen += q_len
        pad = (padding - (seen - q_len)).clamp(0, q_len).int()
        stream.feed(q_len, mask[:, :seen], pad)
    assert stream.cache.get_seq_length() == 40 and stream.seq_lens.tolist() == [40, 37, 20]


def test_a_masked_token_of_a_decode_step_is_skipped_by_its_row():
    stream = Stream(new_cache(), batch=2)
    stream.feed(5)
    stream.feed(1, torch.tensor([[1] * 6, [1] * 5 + [0]]), torch.tensor([0, 1], dtype=torch.int32))
    stream.feed(1)
    assert stream.seq_lens.tolist() == [7, 6]


@pytest.mark.parametrize("index", [[1, 0, 1], [2, 2, 2], [2, 0], [0, 0, 1, 1, 2, 2]], ids=str)
def test_rows_can_be_reordered_dropped_and_repeated(index):
    stream, mask = Stream(new_cache(), batch=3), torch.ones(3, 11)
    mask[1, :4] = 0
    stream.feed(11, mask, torch.tensor([0, 4, 0], dtype=torch.int32))
    addresses = [store.buffers["keys"].data_ptr() for store in stream.cache.stores]
    if len(index) == 3:
        stream.cache.reorder_cache(torch.tensor(index))
        assert [store.buffers["keys"].data_ptr() for store in stream.cache.stores] == addresses, "reordering moved the buffers"
    elif len(index) == 6:
        stream.cache.batch_repeat_interleave(2)
    else:
        stream.cache.batch_select_indices(torch.tensor(index))
    stream.keep_rows(index)
    slots = 11 + SINK + WINDOW  # of the longest row, and of the ring
    assert stream.cache.kv_bytes() == len(index) * slots * 2 * 2 * HEAD_DIM * 4, "rows, slots, K and V, heads, head_dim, bytes"
    for q_len in (1, 7, 1):
        stream.feed(q_len)


@pytest.mark.parametrize("max_len", [None, 3000])
def test_a_cache_grows_where_it_stands_and_its_reset_gives_the_memory_back(max_len):
    stream, sizes, addresses = Stream(new_cache(max_len=max_len), batch=1), [], set()

    def note():
        sizes.append(stream.cache.memory_bytes())
        addresses.add(tuple(t.data_ptr() for store in stream.cache.stores for t in store.buffers.values()))

    for q_len in (200, 1, 55, 1, 1000, 1):
        stream.feed(q_len)
        note()
    rings, token = 2 * 2 * (SINK + WINDOW) * HEAD_DIM * 4, 2 * 2 * HEAD_DIM * 4  # K and V, heads, head_dim, bytes
    assert [size - rings for size in sizes] == [token * n for n in (256, 256, 256, 512, 1280, 1280)]
    stream.cache.reset()
    assert stream.cache.memory_bytes() == rings
    again = Stream(stream.cache, batch=1)
    again.feed(20)
    again.keep_rows([0])
    note()
    assert len(addresses) == 1


@pytest.mark.parametrize("positions, reserved", [(1000, 1000), (1 << 20, 1 << 17), (0, 1 << 17)])
def test_addresses_are_reserved_for_what_the_model_was_made_for(positions, reserved):
    """Without `max_len`; more come when these are full."""
    config = copy.deepcopy(CONFIG)
    config.max_position_embeddings = positions
    stream = Stream(zz.ZigzagCache(config, zz.Plan(KINDS, sink=SINK, window=WINDOW)), batch=2)
    stream.feed(600)
    buffers = list(stream.cache.stores[0].growing.values())
    assert [buffer.max_slots for buffer in buffers] == [reserved] * 2
    stream.feed(300)
    assert all(buffer.max_slots >= 900 for buffer in buffers)
    stream.feed(1)
    longer = Stream(zz.ZigzagCache(config, zz.Plan(KINDS, sink=SINK, window=WINDOW)), batch=1)
    longer.feed(1100)


class OutOfMemory:
    """Makes the n-th growth of a buffer fail, once."""

    def __init__(self, monkeypatch, nth):
        self.left, self.commit = nth, GrowingBuffer.commit
        monkeypatch.setattr(GrowingBuffer, "commit", lambda *args: self.grow(*args))

    def grow(self, *args):
        self.left -= 1
        if not self.left:
            raise MemoryError
        self.commit(*args)


@pytest.mark.parametrize("nth", [1, 2, 3, 4, 6])
def test_out_of_memory_while_growing_can_be_retried(monkeypatch, nth):
    stream = Stream(new_cache(("retrieval", "streaming", "retrieval", "retrieval")), batch=1)
    stream.feed(250)
    OutOfMemory(monkeypatch, nth)
    with pytest.raises(MemoryError):
        stream.cache.forward(1, 300).__enter__()
    assert stream.cache.get_seq_length() == 250
    for q_len in (6, 1, 1, 300):  # fits what there was, then needs the growth that failed
        stream.feed(q_len)
    assert all(layer.stores[0].growing["keys"].slots >= 558 for layer in stream.cache.layers if not layer.window)


def test_a_context_beyond_all_memory_is_an_error_and_leaves_the_cache_usable():
    stream = Stream(new_cache(max_len=1 << 30), batch=1)
    stream.feed(10)
    with pytest.raises(MemoryError, match="out of memory: 1,0.* bytes are needed on cpu, .* are free; nothing was changed"):
        stream.cache.reserve(1_000_000_000)  # 512 bytes a token, K and V each: a terabyte
    stream.feed(1)


def test_a_copy_has_memory_of_its_own():
    stream = Stream(new_cache(), batch=2)
    stream.feed(30)
    other = copy.deepcopy(stream)
    for copied, original in zip(other.cache.layers, stream.cache.layers, strict=True):
        store = copied.stores[0]
        assert store.buffers["keys"].data_ptr() != original.stores[0].buffers["keys"].data_ptr()
        assert all(store.buffers[name] is buffer.tensor for name, buffer in store.growing.items())
    for q_len in (1, 300, 1):
        other.feed(q_len)
        stream.feed(q_len)


def test_a_forward_that_failed_before_attention_holds_nothing():
    stream = Stream(new_cache(max_len=10), batch=1)
    stream.feed(4)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), stream.cache.forward(1, 5):
            raise ZeroDivisionError
    stream.feed(6)
    with pytest.raises(RuntimeError, match="10 are held"):
        stream.cache.reserve(1)


def test_memory_bytes_counts_what_is_allocated():
    cache = new_cache(max_len=104)
    assert cache.memory_bytes() == 0
    Stream(cache, batch=3).feed(1)
    # K and V, rows, heads, slots, head_dim, bytes; 104 slots of both heads are 13 pages
    assert cache.memory_bytes() == 2 * 3 * 2 * (104 + SINK + WINDOW) * HEAD_DIM * 4


def test_a_full_cache_raises_before_anything_is_written():
    stream = Stream(new_cache(max_len=10), batch=1)
    stream.feed(9)
    before = [copy.deepcopy((layer.keys, layer.values)) for layer in stream.cache.layers]
    with pytest.raises(RuntimeError, match="max_len is 10 tokens, this forward needs 11 .9 are held"):
        stream.cache.forward(1, 2).__enter__()
    for layer, old in zip(stream.cache.layers, before, strict=True):
        torch.testing.assert_close((layer.keys, layer.values), old, equal_nan=True, rtol=0, atol=0)
    stream.feed(1)


def test_streaming_layers_alone_have_no_limit():
    stream = Stream(new_cache(("streaming",) * 2, max_len=10), batch=1)
    for _ in range(30):
        stream.feed(1)
    assert stream.cache.get_max_length() == -1
    assert [layer.keys.shape[2] for layer in stream.cache.layers] == [SINK + WINDOW] * 2


def test_what_a_cache_reports():
    cache = new_cache(max_len=50)
    assert cache.seq_lens is None and cache.get_seq_length() == 0 and len(cache) == 2
    assert cache.get_max_length() == cache.get_max_cache_shape() == 50
    assert cache.get_max_length(0) == 50 and cache.get_max_length(1) == -1 and new_cache().get_max_length() == -1
    Stream(cache, batch=2).feed(20)
    assert cache.get_seq_length(1) == 20 and cache.get_mask_sizes(3, 1) == (23, 0)
    assert not cache.is_croppable and not cache.is_compileable
    assert repr(cache) == f"ZigzagCache(layers=[retrieval, streaming(sink={SINK}, window={WINDOW})])"


def test_a_new_batch_size_needs_an_empty_cache():
    cache = new_cache()
    Stream(cache, batch=2).feed(4)
    with pytest.raises(ValueError, match="holds 2 rows, the input has 3"):
        cache.forward(3, 1).__enter__()
    cache.reset()
    Stream(cache, batch=3).feed(4)


def test_early_initialization_as_transformers_does_it():
    cache = new_cache(max_len=32)
    cache.early_initialization(batch_size=2, num_heads=2, head_dim=HEAD_DIM, dtype=torch.float32, device="cpu")
    assert cache.is_initialized and cache.memory_bytes() > 0
    Stream(cache, batch=2).feed(7)


def test_misuse_raises():
    cache = new_cache()
    with pytest.raises(RuntimeError, match="takes back more than the 0 tokens"):
        cache.crop(-1)
    cache.crop(0)
    with pytest.raises(RuntimeError, match="call zigzag_ext.enable"):
        cache.update(torch.zeros(1, 2, 1, HEAD_DIM), torch.zeros(1, 2, 1, HEAD_DIM), 0)
    with pytest.raises(ValueError, match="max_len must be at least 1"):
        new_cache(max_len=0)
    for wrong in (True, 8.0, "8"):
        with pytest.raises(TypeError, match="max_len must be an integer number of tokens"):
            new_cache(max_len=wrong)
    for wrong in ("plan.json", ["retrieval", "streaming"]):
        with pytest.raises(TypeError, match="plan must be a zigzag_ext.Plan .*got .*(plan.json|retrieval)"):
            zz.ZigzagCache(CONFIG, wrong)
    with pytest.raises(ValueError, match="the plan has 1 layers, the model has 2"):
        zz.ZigzagCache(CONFIG, zz.Plan(["retrieval"], sink=1, window=1))
    with pytest.raises(RuntimeError, match=r"layers \[1\] never called"), cache.forward(1, 2):
        q, k = torch.zeros(1, 4, 2, HEAD_DIM), torch.zeros(1, 2, 2, HEAD_DIM)
        with pytest.raises(ValueError, match="must have one shape"):
            cache.layers[0].attend(q, k, k[..., :32], 1.0)
        with pytest.raises(ValueError, match="1 rows x 1 tokens in a forward of 1 rows x 2 tokens"):
            cache.layers[0].attend(q[:, :, :1], k[:, :, :1], k[:, :, :1], 1.0)
        cache.layers[0].attend(q, k, k, 1.0)
        with pytest.raises(RuntimeError, match="layer 0 attended twice"):
            cache.layers[0].attend(q, k, k, 1.0)
