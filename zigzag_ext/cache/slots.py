"""Slots: the rows of a ZigzagCache as places that requests come to and leave, each with tokens and memory of its own.

The cache is made for all rows at once, and a forward is over some of them: `SlotForward`. A retrieval layer's memory comes row by
row as tokens come and goes with the row; rings have theirs for all rows from the start.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..attention import ops
from ..attention.store import GROWTH_STEP, Chunk, LayerStore, in_normal_mode
from .cache import ZigzagCache
from .columns import Copies, copy_on
from .forward import Forward
from .state import locked
from .tokens import to_device


class Slots:
    """`count` rows of a new cache. `take` a row, run forwards over it, and `release` it.

    like: a cache of the same model and plan, after a forward: keys to come have the geometry, dtype and device of its own.
    limits: [count], most tokens of each row that is taken, 0 for others. committed: [count], tokens of each row that retrieval
    layers have memory for.

    Raises:
        ValueError: the cache grows without end, compresses prompts, or has layers with states, which take in all rows at once.
    """

    def __init__(self, cache: ZigzagCache, count: int, like: ZigzagCache):
        self.cache, self.state = cache, cache.state
        if cache.state.max_len is None or cache.state.compression is not None:
            raise ValueError("rows that come and go need a cache with a max_len and without compress")
        if cache.states:
            layers = [states.index for states in cache.states]
            raise ValueError(f"layers {layers} keep recurrent or convolution states, which cannot be those of some rows only")
        cache.state.start(count)
        for layer, known in zip(cache.attention_layers, like.attention_layers, strict=True):
            _, num_kv_heads, head_dim = known.stores[0].geometry
            keys = torch.empty(count, num_kv_heads, 0, head_dim, dtype=known.dtype, device=known.device)
            layer.lazy_initialization(keys, keys)
            layer.release()  # of what a GPU needs to know addresses by
        self.limits, self.committed = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        self.went_back = np.zeros(count, dtype=np.int64)  # tokens that the rings of a row had taken in when it was resumed
        self.void: set[int] = set()  # rows that a forward has failed on: their contents are unknown
        self.latest: tuple[list[int], Copies] = [], {}  # rows of the latest forward, -1 for those to skip, and on devices

    @property
    def held(self) -> np.ndarray:
        """[count] tokens of each row."""
        return self.state.rows.held

    def row_memory(self, tokens: int) -> int:
        """Bytes of the pages that a row of so many tokens takes."""
        return sum(store.row_memory(tokens) for store in self.cache.stores)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the pages that all rows take now; rings, which take none of them, apart."""
        return sum(store.memory_bytes for store in self.cache.stores if store.growing)

    @property
    def ring_bytes(self) -> int:
        """Bytes of the rings of all rows."""
        return sum(store.memory_bytes for store in self._rings)

    @property
    def ring_row_bytes(self) -> int:
        """Bytes of the rings of one row."""
        return self.ring_bytes // len(self.limits)

    @property
    def _rings(self) -> list[LayerStore]:
        return [store for store in self.cache.stores if store.window]

    @locked
    def take(self, row: int, tokens: int) -> None:
        """Row `row` is for up to `tokens` tokens from now on."""
        if self.limits[row] or not 1 <= tokens <= self.state.max_len:
            raise ValueError(f"row {row} is taken, or {tokens} tokens are not 1 to {self.state.max_len}")
        self.limits[row] = tokens

    @locked
    def extend(self, row: int, tokens: int) -> None:
        """Row `row`, which is taken, is for up to `tokens` tokens from now on, no fewer than it has memory for."""
        if not max(1, self.committed[row]) <= tokens <= self.state.max_len:
            raise ValueError(f"row {row} is for {self.committed[row]} to {self.state.max_len} tokens, got {tokens}")
        self.limits[row] = tokens

    @property
    def ringed(self) -> np.ndarray:
        """[count] tokens as of which the rings of each row are: those held, or more where it was resumed, until so many come."""
        return np.maximum(self.held, self.went_back)

    def reach(self, tokens: int, wanted: int) -> int:
        """Where a text can go on whose first `wanted` tokens are those of a row, with its rings as of its first `tokens` ones.

        A place of at most `wanted` and `tokens`; 0: none. One token earlier than they are is no loss: the oldest token that rings
        hold is the one that the next query no longer sees. And rings that have not come round hold all.
        """
        back = tokens - wanted
        if back <= 0 or all(back <= store.rollback + 1 or tokens <= store.ring_slots for store in self._rings):
            return min(tokens, wanted)
        return 0

    @in_normal_mode
    def rings_of(self, row: int) -> list[Tensor]:
        """Copies of the rings of a row, of `ring_row_bytes` bytes, for `resume`."""
        return [buffer[row].clone() for store in self._rings for buffer in store.plain.values()]

    @locked
    @in_normal_mode
    def resume(self, row: int, source: int, tokens: int, ringed: int, rings: list[Tensor] | None = None) -> None:
        """Row `row`, which is taken, holds the first `tokens` tokens of row `source`, which may be itself, and nothing else.

        rings: `rings_of(source)` as of its first `ringed` tokens, from which it can `reach` them; None: as they are now. Waits
        for nothing. Raises ValueError if the source does not hold so many, and what `grow` raises; the row is as it was then.
        """
        self.state.check()
        if not 0 < tokens <= self.held[source] or self.void.intersection((row, source)):
            raise ValueError(f"row {source} holds {self.held[source]} tokens, {tokens} are to be those of row {row}")
        if row != source:
            self.grow(row, max(0, tokens - int(self.held[row])))
        self.void.add(row)
        for store in self.cache.stores if row != source else ():
            if store.key_offset is not None:
                store.key_offset[row].copy_(store.key_offset[source])
            for buffer in store.growing.values():
                buffer.copy_row(source, row, tokens)
        if rings is not None or row != source:
            own = [buffer for store in self._rings for buffer in store.plain.values()]
            for buffer, held in zip(own, rings or [buffer[source] for buffer in own], strict=True):
                buffer[row].copy_(held)
        self.went_back[row] = ringed
        for lengths in self.state.seq_lens.values():
            lengths[:, row].fill_(tokens)
        self.state.rows = self.state.rows.without(row).grown_by(np.where(np.arange(self.state.batch) == row, tokens, 0))
        self.void.discard(row)

    @locked
    def grow(self, row: int, tokens: int) -> None:
        """Memory for `tokens` more tokens of a row. Raises RuntimeError beyond its limit, MemoryError where there is none."""
        needed, limit = int(self.held[row]) + tokens, int(self.limits[row])
        if needed > limit:
            raise RuntimeError(f"row {row} was taken for {limit} tokens, this forward needs {needed}; nothing was written")
        if needed > self.committed[row]:
            capacity = min(-(-needed // GROWTH_STEP) * GROWTH_STEP, limit)
            for store in self.cache.stores:
                store.commit_row(row, capacity)
            self.committed[row] = capacity

    @locked
    @in_normal_mode
    def release(self, row: int) -> None:
        """Empties a row and gives its memory back."""
        state = self.state
        state.check()
        for lengths in state.seq_lens.values():
            lengths[:, row].zero_()
        state.rows = state.rows.without(row)
        self.limits[row] = self.committed[row] = self.went_back[row] = 0
        for store in self.cache.stores:
            store.release_row(row)
        self.void.discard(row)

    def forward(self, rows: Sequence[int], q_len: int, batch: int | None = None) -> "SlotForward":
        """`with slots.forward(rows, q_len):` brackets a forward pass of `q_len` new tokens behind each of `rows`.

        batch: rows that the input has, of which those behind `rows` are skipped: a step of that size, which may be compiled.
        None: as many as `rows`.
        """
        return SlotForward(self, rows, q_len, batch)

    def check(self) -> None:
        """Raises RuntimeError unless what is noted here is what buffers and devices have. Waits for the device."""
        held, faults = self.held, []
        for store in self.cache.stores:
            for buffer in store.growing.values():
                if buffer.row_slots != tuple(self.committed.tolist()):
                    faults.append(f"rows have memory for {buffer.row_slots} slots")
        if (pages := sum(map(self.row_memory, self.committed.tolist()))) != self.memory_bytes:
            faults.append(f"{self.memory_bytes} bytes are committed instead of {pages}")
        if (held > self.limits).any() or (self.committed > self.limits).any():
            faults.append(f"limits are {self.limits.tolist()}")
        for device, lengths in self.state.seq_lens.items():
            if (lengths.cpu().numpy() != held).any():
                faults.append(f"{device} has lengths {lengths.tolist()}")
        if faults:
            noted = f"rows hold {held.tolist()} tokens with memory for {self.committed.tolist()}"
            raise RuntimeError(f"the slots of the ZigzagCache are not as noted: {noted}, but {'; '.join(faults)}")


class SlotForward(Forward):
    """A forward over some rows of `Slots`: `q_len` new tokens behind each, no padding.

    One row may take any number of tokens: what serves prompts serves it. Several take up to `MAX_DECODE_QUERIES`. A forward that
    fails leaves other rows as they were, and its own to be released.
    """

    def __init__(self, slots: Slots, rows: Sequence[int], q_len: int, batch: int | None = None):
        super().__init__(slots.cache, len(rows) if batch is None else batch, q_len)
        self.slots, self.rows, self.is_fixed = slots, np.asarray(rows, dtype=np.int32), batch is not None

    @property
    def is_step(self) -> bool:
        return self.is_fixed

    @locked
    def __enter__(self) -> "SlotForward":
        state, rows = self.state, self.rows.tolist()
        state.check()
        if not rows or len({*rows}) < len(rows) or not all(0 <= row < state.batch for row in rows):
            raise ValueError(f"a forward takes distinct rows of 0 to {state.batch - 1}, got {rows}")
        if self.batch < len(rows):
            raise ValueError(f"a step of {self.batch} rows cannot be over {len(rows)}")
        if self.total < 1 or (self.batch > 1 and self.total > ops.MAX_DECODE_QUERIES):
            raise ValueError(
                f"a forward over {len(rows)} rows takes 1 to {ops.MAX_DECODE_QUERIES} tokens of each, got {self.total}; "
                "longer ones take a row at a time"
            )
        if void := self.slots.void.intersection(rows):
            raise RuntimeError(f"a forward over rows {sorted(void)} has failed: release them first")
        for row in rows:
            self.slots.grow(row, self.total)
        self.before, self.lengths = state.rows, {}
        self.after = self.before.grown_by(np.bincount(self.rows, minlength=state.batch) * self.total)
        state.num_forwards += 1
        state.forward = self
        return self

    @property
    def columns(self) -> int:
        """Tokens of the longest of its rows before the forward."""
        return int(self.before.ends[self.rows].max())

    def check_keys(self, layer: int, k: Tensor) -> None:
        super().check_keys(layer, k)
        store = self.cache.layers[self.state.sources[layer]].stores[0]
        if (store.dtype, store.device) != (k.dtype, k.device):
            raise ValueError(
                f"layer {layer} gives {str(k.dtype)[6:]} keys on {k.device}, its rows are {str(store.dtype)[6:]} on "
                f"{store.device}: leave the model where it is while rows are served"
            )

    @in_normal_mode
    def _chunk(self, device: torch.device) -> Chunk:
        chunk = Chunk(self.state.lengths_on(device), None, self.state.workspace(device), cache_rows=self.rows_on(device))
        if self.batch > 1 or self.is_fixed:
            return chunk._replace(decodes=True)
        row = int(self.rows[0])
        past = int(self.before.held[row])
        return chunk._replace(row=row, past=past, started=past > 0)

    @in_normal_mode
    def rows_on(self, device: torch.device) -> Tensor:
        """[batch] int32, the rows, and -1 for those to skip: one tensor as long as they are the same."""
        rows = [*self.rows.tolist(), *[-1] * (self.batch - len(self.rows))]
        if self.slots.latest[0] != rows:
            self.slots.latest = rows, {device: to_device(np.array(rows, dtype=np.int32), device)}
        return copy_on(self.slots.latest[1], device)

    @in_normal_mode
    def _commit(self, last: bool) -> None:
        """Advances the lengths."""
        state = self.state
        for device, lengths in state.seq_lens.items():
            index = self.rows_on(device)[: len(self.rows)]
            lengths.index_add_(1, index, lengths.new_full((len(lengths), len(index)), self.total))
        state.rows, state.forward = self.after, None

    def roll_back(self) -> None:
        if self.state.forward is self:
            self.slots.void.update(self.rows.tolist())
            self.state.forward = None
