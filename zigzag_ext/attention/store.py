"""LayerStore: keys and values of one layer, or of some KV heads of it, and the one path that attends and appends."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _C
from ..planning.kv_format import PLAIN, KvFormat
from . import ops, routes, smoothing
from .buffers import GrowingBuffer
from .chunk import NO_TERMS, Chunk, LogitTerms

GROWTH_STEP = 256  # tokens that retrieval layers ask memory for at once; it comes in pages
MAX_TOKENS = 1 << 30  # per row; positions are int32
_FIRST_TOKENS = 1 << 17  # most that there are addresses for at first where no limit is given; twice as many when they are full
_SCALES = {"keys": "key_scales", "values": "value_scales"}


def in_normal_mode(function):
    """Tensors made under `torch.inference_mode` cannot be written outside it; a cache outlives the mode it was made in."""
    return torch.inference_mode(False)(torch.no_grad()(function))


class LayerStore:
    """Key and value buffers of one kind, plain or quantised: a full buffer (`window` 0) or a ring.

    Args:
        sink, window: tokens that a streaming layer keeps; window 0: a retrieval layer, which keeps all.
        rollback: slots that a ring has beside sink + window, so that as many tokens can be taken back.
        kv_format: of keys and values.
        smooth: hold quantised keys less `key_offset` [batch, num_kv_heads, 1, head_dim], see `smoothing`.
        heads: the KV heads of the layer that are held here; None: all. `head_numbers` are the same, [n] int32 on the device.
        lengths: which of `Chunk.seq_lens` count the tokens held here: others than the first where tokens can be left out.

    `buffers` are what the ops take, by name: keys, values, and if quantised key_scales, value_scales. Those of a retrieval layer
    may be addresses for all tokens to come, of which the first `capacity` have memory, see `GrowingBuffer.tensor`.
    """

    def __init__(
        self,
        sink: int = 0,
        window: int = 0,
        rollback: int = 0,
        kv_format: KvFormat = PLAIN,
        smooth: bool = False,
        heads: tuple[int, ...] | None = None,
        lengths: int = 0,
    ):
        self.sink, self.window, self.kv_format, self.heads = sink, window, kv_format, heads
        self.rollback, self.lengths = rollback if window else 0, lengths
        self.smooth = smooth and kv_format.k != "none"
        self.drop()

    def __getstate__(self) -> dict:
        """For copies: growing buffers first, as keys, values and scales are views that only they can copy."""
        return {"growing": self.growing, **self.__dict__}

    def __repr__(self) -> str:
        kind = f"streaming(sink={self.sink}, window={self.window})" if self.window else "retrieval"
        kind += "" if self.kv_format == PLAIN else f", {self.kv_format}"
        return f"{kind}, smoothed keys" if self.smooth else kind

    def drop(self) -> None:
        """Lets go of all buffers."""
        self.plain: dict[str, Tensor] = {}  # buffers that do not grow
        self.growing: dict[str, GrowingBuffer] = {}  # those of a retrieval layer that do
        self.head_numbers: Tensor | None = None
        self.key_offset: Tensor | None = None
        self.capacity = 0  # slots with memory
        self.is_allocated = False

    @in_normal_mode
    def allocate(
        self,
        k: Tensor,
        capacity: int,
        max_len: int | None,
        keeps: bool = True,
        grows: bool = True,
        expected: int | None = None,
    ) -> None:
        """Buffers for keys like k [batch, num_kv_heads, q_len, head_dim] of the layer.

        Args:
            capacity: tokens that a retrieval layer gets memory for. max_len: tokens it gets addresses for; None: without end.
            keeps: False for a store without slots, whose chunk attends to itself.
            grows: False for a retrieval layer with plain memory for `capacity` tokens.
            expected: tokens that it gets addresses for at first without max_len, and no more than `_FIRST_TOKENS`.
        """
        batch, num_kv_heads, _, head_dim = k.shape
        self.drop()
        self.dtype, self.max_len, self.geometry = k.dtype, max_len, (batch, num_kv_heads, head_dim)
        if self.heads is not None:
            num_kv_heads = len(self.heads)
            self.head_numbers = torch.tensor(self.heads, dtype=torch.int32, device=k.device)
        self.key_offset = smoothing.new_offset(k) if self.smooth else None
        kinds = {"keys": self.kv_format.k, "values": self.kv_format.v}
        if self.window or not (keeps and grows):
            self.capacity = (self.ring_slots if self.window else capacity) if keeps else 0
            for name, kv_format in kinds.items():
                self.plain[name], scales = ops.new_cache(
                    batch, num_kv_heads, self.capacity, head_dim, k.dtype, k.device, kv_format
                )
                self.plain |= {} if scales is None else {_SCALES[name]: scales}
        else:
            most = max_len or max(min(_FIRST_TOKENS, expected or _FIRST_TOKENS), capacity)
            exact = self.kv_format != PLAIN
            for name, kv_format in kinds.items():
                width, code = ops.cache_row(head_dim, k.dtype, kv_format)
                self.growing[name] = GrowingBuffer(batch, num_kv_heads, most, width, code, k.device, exact)
                if kv_format != "none":
                    self.growing[_SCALES[name]] = GrowingBuffer(batch, num_kv_heads, most, None, torch.float32, k.device, exact)
            self.grow(capacity)
        self.is_allocated = True

    @property
    def buffers(self) -> dict[str, Tensor]:
        if not self.growing:
            return self.plain
        tensors = {name: buffer.tensor for name, buffer in self.growing.items()}
        slots = min(tensor.shape[2] for tensor in tensors.values())  # an extension that failed half-way leaves some longer
        return {name: tensor if tensor.shape[2] == slots else tensor[:, :, :slots] for name, tensor in tensors.items()}

    @property
    def caches(self) -> ops.KvBuffers:
        """The buffers as the ops take them."""
        buffers = self.buffers
        return ops.KvBuffers(buffers["keys"], buffers["values"], buffers.get("key_scales"), buffers.get("value_scales"))

    @property
    def ring_slots(self) -> int:
        return self.sink + self.window + self.rollback

    @property
    def keys(self) -> Tensor | None:
        """[batch, num_kv_heads, slots, head_dim] of what has memory, a copy if the buffer grows; codes if quantised.

        None before the first forward.
        """
        return self._shown("keys")

    @property
    def values(self) -> Tensor | None:
        return self._shown("values")

    def _shown(self, name: str) -> Tensor | None:
        if not self.is_allocated:
            return None
        return self.growing[name].held() if self.growing else self.plain[name]

    @property
    def device(self) -> torch.device:
        return self.buffers["keys"].device

    def bytes_for(self, tokens: int, batch: int, num_kv_heads: int, head_dim: int, element_bytes: int) -> int:
        """Bytes of keys, values and scales of `tokens` tokens (a ring: all its slots) where the layer has `num_kv_heads`."""
        heads = num_kv_heads if self.heads is None else len(self.heads)
        slots = self.ring_slots if self.window else tokens
        return _C.kv_bytes(slots, heads, head_dim, element_bytes, self.kv_format, batch=batch)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of `tokens` tokens in every row: `memory_bytes` without pages and room to grow."""
        if not self.is_allocated:
            return 0
        batch, num_kv_heads, head_dim = self.geometry
        return self.bytes_for(tokens, batch, num_kv_heads, head_dim, self.dtype.itemsize)

    @property
    def memory_bytes(self) -> int:
        if self.growing:
            return sum(buffer.memory_bytes for buffer in self.growing.values())
        return sum(buffer.nbytes for buffer in self.plain.values())

    def is_whole(self, length: int, ahead: int) -> bool:
        """Whether a ring holds all that a row of `length` tokens shows, after `ahead` more were written and taken back."""
        return ahead <= self.rollback or length + ahead <= self.ring_slots

    def _addresses_for(self, capacity: int) -> int:
        """Slots that every growing buffer has addresses for once it has memory for `capacity` of them."""
        most = max(buffer.max_slots for buffer in self.growing.values())
        return most if capacity <= most else max(capacity, 2 * most)

    def moves_for(self, capacity: int) -> bool:
        """Whether `grow(capacity)` takes buffers to new addresses, since there are none behind the old ones."""
        if not self.growing or capacity <= self.capacity:
            return False
        return any(buffer.max_slots < self._addresses_for(capacity) for buffer in self.growing.values())

    def grow(self, capacity: int) -> None:
        """Memory for `capacity` slots of a retrieval layer; fewer than before change nothing."""
        if not self.growing or capacity <= self.capacity:
            return
        slots = self._addresses_for(capacity)
        for buffer in self.growing.values():
            buffer.extend(slots)
            buffer.commit(capacity)
        self.capacity = capacity

    def growth(self, capacity: int) -> list[tuple[GrowingBuffer, int]]:
        """What `grow` would commit, for `buffers.check_free`."""
        grows = capacity > self.capacity
        return [(buffer, capacity) for buffer in self.growing.values() if grows and capacity <= buffer.max_slots]

    def for_compiler(self, through: tuple[int, int] | None = None) -> "LayerStore":
        """The same buffers as plain tensors, the only kind that the compiler knows, which every capacity shares a program for.

        through: the sink and the window that a retrieval layer is read through, if it has slots for more; None: in full.
        """
        other = self._twin()
        if through is not None and not self.window and self.buffers["keys"].shape[2] > sum(through):
            other.sink, other.window = through
        other.plain, other.growing = {name: buffer.as_subclass(Tensor) for name, buffer in self.buffers.items()}, {}
        if not self.window:
            for buffer in other.plain.values():
                torch._dynamo.maybe_mark_dynamic(buffer, 2)
        return other

    def release(self) -> None:
        """Gives the memory of a retrieval layer back and keeps its addresses. Waits for the device."""
        if self.key_offset is not None:
            self.key_offset.zero_()
        if self.growing:
            self.capacity = 0
        for buffer in self.growing.values():
            buffer.release()

    def row_memory(self, slots: int) -> int:
        """Bytes that a row of a retrieval layer takes with memory for `slots` slots; 0 for a ring, which has its own."""
        return sum(buffer.row_memory(slots) for buffer in self.growing.values())

    def commit_row(self, row: int, slots: int) -> None:
        """`grow` for one row of a retrieval layer, within its addresses."""
        for buffer in self.growing.values():
            buffer.commit_row(row, slots)

    @in_normal_mode
    def release_row(self, row: int) -> None:
        """`release` for one row."""
        if self.key_offset is not None:
            self.key_offset[row].zero_()
        for buffer in self.growing.values():
            buffer.release_row(row)

    @in_normal_mode
    def move(self, like: Tensor) -> None:
        """What is held goes to the device and the dtype of `like` [batch, num_kv_heads, 0, head_dim]; codes stay codes."""
        if (like.device, like.dtype) == (self.device, self.dtype):
            return
        other = self._twin()  # so that an interrupt leaves all or nothing moved
        other.allocate(like, self.capacity, self.max_len, grows=bool(self.growing))
        for name, buffer in self.buffers.items():
            other.buffers[name][:, :, : self.capacity] = buffer[:, :, : self.capacity].to(like.device)
        vars(self).update(vars(other))

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values of slots [start, stop), in the dtype of the layer: codes widened, smoothed keys less their offset.

        Each [batch, heads, stop - start, head_dim].
        """
        return routes.Stored.of(self.caches, self.dtype).read(start, stop)

    @in_normal_mode
    def keep_slots(self, index: Tensor, tokens: int) -> None:
        """Of a retrieval layer whose longest row holds `tokens`: slot i becomes what slot index[:, :, i] was, the rest goes.

        index [batch, heads or 1, kept] int64, ascending. `Chunk.seq_lens` are the caller's to lower. Waits for the device.
        """
        kept = index.shape[2]
        for buffer in self.buffers.values():
            buffer = buffer.view(torch.uint8) if buffer.itemsize == 1 else buffer
            at = index.expand(-1, buffer.shape[1], -1)
            at = at if buffer.dim() == 3 else at[..., None].expand(-1, -1, -1, buffer.shape[3])
            buffer[:, :, :kept] = buffer[:, :, :tokens].gather(2, at)
        if self.growing:
            self.capacity = min(self.capacity, kept)
        for buffer in self.growing.values():
            buffer.shrink(self.capacity)

    @in_normal_mode
    def select_rows(self, index: Tensor, held: int) -> None:
        """Row i becomes what row index[i] was, of its first `held` tokens; as many rows as before, in place."""
        self._copy_rows(self, index, held)

    @in_normal_mode
    def with_rows(self, index: Tensor, held: int) -> "LayerStore":
        """Another one, of len(index) rows: its row i has what row index[i] has, of its first `held` tokens."""
        other, batch = self._twin(), len(index)
        other.geometry = (batch, *self.geometry[1:])
        if self.key_offset is not None:
            other.key_offset = self.key_offset.new_empty(batch, *self.key_offset.shape[1:])
        other.growing = {name: buffer.with_batch(batch) for name, buffer in self.growing.items()}
        other.plain = {name: buffer.new_empty(batch, *buffer.shape[1:]) for name, buffer in self.plain.items()}
        self._copy_rows(other, index, held)
        return other

    def _copy_rows(self, other: "LayerStore", index: Tensor, held: int) -> None:
        held, index = self.capacity if self.window else min(held, self.capacity), index.to(self.device)
        if self.key_offset is not None:
            other.key_offset.copy_(self.key_offset.index_select(0, index))
        for buffer, to in zip(self.buffers.values(), other.buffers.values(), strict=True):
            to[:, :, :held] = buffer[:, :, :held].index_select(0, index)

    def bytes_with_rows(self, batch: int) -> int:
        """Bytes of memory that `with_rows` takes for `batch` rows."""
        if not self.growing:
            return sum(buffer.nbytes for buffer in self.plain.values()) // self.geometry[0] * batch
        return batch * sum(buffer.row_memory(self.capacity) for buffer in self.growing.values())

    def _twin(self) -> "LayerStore":
        other = object.__new__(LayerStore)
        vars(other).update(vars(self))
        return other

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        chunk: Chunk,
        out: Tensor | None = None,
        terms: LogitTerms = NO_TERMS,
        is_last: bool = True,
    ) -> Tensor:
        """Attention of the chunk over the store and itself, then append.

        q [batch, num_q_heads, q_len, head_dim], k, v [batch, num_kv_heads, q_len, head_dim]: all heads of the layer. out: where
        the results of `heads` go, see `ops.new_output`. is_last: whether no other layer attends this chunk after this one.

        Layers that share a store bring it the same keys and values, each with its own queries, before any length advances. The
        op looks for keys by position, and an append writes the same tokens to the same slots. So appending once per layer is
        what appending once is, where it overwrites nothing that the next layer's queries see: in full buffers, and in rings for
        up to `rollback` + 1 tokens. A ring that loses older tokens to the chunk is appended to by the last layer; the others
        attend a copy of it, which costs sink + window tokens and is thrown away.
        """
        if self.key_offset is not None and terms != NO_TERMS:
            raise ValueError("key_smoothing moves all logits of a query alike, which soft caps and sink logits would notice")
        seq_lens, cache_rows, caches = chunk.seq_lens[self.lengths], chunk.cache_rows, self.caches
        if self.key_offset is not None:
            offset = chunk.rows_of(self.key_offset, q.shape[0])
            if smoothing.sets_offsets(k.shape[2], chunk.started):
                smoothing.set_offsets(offset, k, chunk.rows_of(seq_lens, q.shape[0]), chunk.pad)
            k = k - offset
        if self.window and chunk.row is not None:  # not of a full cache: without cache_rows, kernels read ahead of its length
            seq_lens, cache_rows = chunk.rows_of(seq_lens, 1), None
        if cache_rows is None and q.shape[0] < caches.keys.shape[0]:
            caches = caches.map(lambda t: chunk.rows_of(t, q.shape[0]))
        if not is_last and self.window and q.shape[2] > self.rollback + 1:
            caches = caches.map(torch.clone)
        options = {"pad": chunk.pad, "heads": self.head_numbers, "out": out, "sink": self.sink, "window": self.window}
        options |= {"scale": scale, "workspace": chunk.workspace, "cache_rows": cache_rows, **terms._asdict()}
        if q.shape[2] > 1 and chunk.cos is None and not chunk.decodes:
            return routes.attend(q, k, v, caches, seq_lens, past=chunk.past_of(self.lengths), row=chunk.row, **options)
        rope = {"cos": chunk.cos, "sin": chunk.sin}
        return ops.attention(q, k, v, *caches[:2], seq_lens, **rope, **options, **caches.scales)[0]


def attend(
    stores: Sequence[LayerStore],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    chunk: Chunk,
    terms: LogitTerms = NO_TERMS,
    is_last: bool = True,
) -> Tensor:
    """Attention of one layer, then append: out [batch, num_q_heads, q_len, head_dim]. One call per store, each for its heads."""
    if len(stores) == 1:
        return stores[0].attend(q, k, v, scale, chunk, None, terms, is_last)
    out, _ = ops.new_output(q)
    for store in stores:
        store.attend(q, k, v, scale, chunk, out, terms, is_last)
    return out
