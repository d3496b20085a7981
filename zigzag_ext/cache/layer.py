"""ZigzagLayer: the cache of one layer of a ZigzagCache, a full buffer or a ring, plain or quantised."""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..attention import ops, routes
from ..attention.buffers import GrowingBuffer
from ..planning.kv_format import PLAIN, KvFormat
from . import smoothing
from .state import Rows, in_normal_mode

GROWTH_STEP = 256  # tokens that a retrieval layer asks memory for at once; it comes in pages
_ENDLESS = 1 << 38  # bytes of addresses per buffer where no max_len is given: more than a machine has memory for
_MOST_TOKENS = 1 << 30  # positions are int32


class ZigzagLayer(CacheLayerMixin):
    """The cache of one layer, allocated at first use from the keys.

    `keys` and `values` [batch, num_kv_heads, slots, head_dim] show what has memory. `buffers` are the whole tensors that kernels
    take, by name: those of a retrieval layer are addresses for all tokens to come, and touching one without memory is a crash.
    As a part of a `MixedLayer` it holds the KV heads `heads` only. With `smooth`, keys are held less `key_offset`
    [batch, num_kv_heads, 1, head_dim], which has all heads that the layer is given.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False  # mask sizes are the same for every layer: masks are never built

    def __init__(
        self, rows: Rows, index: int, sink: int, window: int, kv_format: KvFormat = PLAIN, smooth: bool = False, heads=None
    ):
        self.is_initialized = False  # instead of the base class, whose constructor sets keys and values
        self.heads: tuple[int, ...] | None = heads
        self.head_numbers: Tensor | None = None  # the same, [n] int32 on the device
        self.rows, self.index, self.sink, self.window, self.kv_format = rows, index, sink, window, kv_format
        self.smooth = smooth and kv_format.k != "none"
        self.key_offset: Tensor | None = None
        self.buffers: dict[str, Tensor] = {}  # keys, values; if quantised also key_scales, value_scales [..., slots] float32
        self.growing: dict[str, GrowingBuffer] = {}  # behind the buffers of a retrieval layer, by attribute

    def __getstate__(self) -> dict:
        """For copies: growing buffers first, as keys, values and scales are views that only they can copy."""
        return {"growing": self.growing, **self.__dict__}

    def __repr__(self) -> str:
        kind = f"streaming(sink={self.sink}, window={self.window})" if self.window else "retrieval"
        kind += "" if self.kv_format == PLAIN else f", {self.kv_format}"
        return f"{kind}, smoothed keys" if self.smooth else kind

    @property
    def parts(self) -> "list[ZigzagLayer]":
        """Itself: what it is to code that also serves a `MixedLayer`."""
        return [self]

    @property
    def keys(self) -> Tensor | None:
        """Codes if the format is quantised; None before the first forward."""
        return self.buffers["keys"][:, :, : self.slots] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        return self.buffers["values"][:, :, : self.slots] if self.is_initialized else None

    @property
    def slots(self) -> int:
        if not self.rows.stores:
            return 0
        return self.sink + self.window if self.window else self.rows.capacity

    @in_normal_mode
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Device, dtype and the local number of heads come from the keys, so it works under device_map and tensor parallelism."""
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"layer {self.index}: keys {tuple(key_states.shape)} and values {tuple(value_states.shape)} must have one shape"
            )
        batch, num_kv_heads, _, head_dim = key_states.shape
        if self.heads is not None:
            num_kv_heads = len(self.heads)
            self.head_numbers = torch.tensor(self.heads, dtype=torch.int32, device=key_states.device)
        if self.rows.batch is None:
            self.rows.start(batch)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_offset = smoothing.new_offset(key_states) if self.smooth else None
        kinds = {"keys": self.kv_format.k, "values": self.kv_format.v}
        if self.window or not self.rows.stores:
            geometry = (batch, num_kv_heads, self.slots, head_dim, self.dtype, self.device)
            for (name, kv_format), scales in zip(kinds.items(), ("key_scales", "value_scales"), strict=True):
                self.buffers[name], scale = ops.new_cache(*geometry, kv_format)
                self.buffers |= {} if scale is None else {scales: scale}
        else:
            most = self.rows.max_len or min(_ENDLESS // (batch * num_kv_heads * head_dim * self.dtype.itemsize), _MOST_TOKENS)
            for (name, kv_format), scales in zip(kinds.items(), ("key_scales", "value_scales"), strict=True):
                width, code = ops.cache_row(head_dim, self.dtype, kv_format)
                exact = self.kv_format != PLAIN
                self.growing[name] = GrowingBuffer(batch, num_kv_heads, most, width, code, self.device, exact)
                if kv_format != "none":
                    self.growing[scales] = GrowingBuffer(batch, num_kv_heads, most, None, torch.float32, self.device, exact)
            self.grow(self.slots)
            self.buffers = {name: buffer.tensor for name, buffer in self.growing.items()}
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Returns the new keys and values as they are; `attend` appends them. Raises outside an enabled model's forward."""
        if not self.rows.q_len:
            raise RuntimeError("a ZigzagCache works only with zigzag attention: call zigzag_ext.enable(model, plan) first")
        self.rows.given.add(self.index)
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Attention of the chunk over this layer and itself, then append. Returns out [batch, num_q_heads, q_len, head_dim]."""
        rows = self.rows
        rows.check_chunk(self.index, k)
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        tensors, options = self._arguments(q, k, v, scale)
        if q.shape[2] == 1:
            out, _ = ops.attention(*tensors, **options)
        else:
            out = routes.attend(*tensors, past=rows.columns if rows.uniform else None, **options)
        rows.attended.add(self.index)
        return out

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, out: Tensor, lse: Tensor) -> None:
        """The same for `heads` only, which `q`, `k` and `v` are not the only ones of, into their place in `out` and `lse`."""
        tensors, options = self._arguments(q, k, v, scale)
        routes.attend_heads(*tensors, self.head_numbers, out, lse, **options)

    def _smoothed(self, k: Tensor) -> Tensor:
        """Keys as they are cached, less the offsets of their rows; sets those of rows that start with this chunk."""
        if self.key_offset is None:
            return k
        rows = self.rows
        if smoothing.sets_offsets(k.shape[2], rows.columns > 0 and rows.uniform):
            smoothing.set_offsets(self.key_offset, k, rows.lengths_on(k.device), rows.pad_on(k.device))
        return k - self.key_offset

    def _arguments(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[tuple, dict]:
        rows, k = self.rows, self._smoothed(k)
        options = {
            "pad": rows.pad_on(q.device),
            "sink": self.sink,
            "window": self.window,
            "scale": scale,
            "k_scale": self.buffers.get("key_scales"),
            "v_scale": self.buffers.get("value_scales"),
            "workspace": rows.workspace(q.shape[1], k.shape[1], q.shape[3], q.device),
        }
        return (q, k, v, self.buffers["keys"], self.buffers["values"], rows.lengths_on(q.device)), options

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.rows.columns

    def get_max_length(self) -> int:
        """Most tokens a row can hold: `max_len` for a retrieval layer, -1 (no limit) for a ring or a growing cache."""
        return -1 if self.window or self.rows.max_len is None else self.rows.max_len

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.rows.forget()

    def release(self) -> None:
        """Forgets all tokens, gives the memory of a retrieval layer back and keeps its addresses. Waits for the device."""
        if self.key_offset is not None:
            self.key_offset.zero_()
        for buffer in self.growing.values():
            buffer.release()

    def drop(self) -> None:
        self.buffers = {}
        self.growing = {}
        self.key_offset = None
        self.is_initialized = False

    def grow(self, capacity: int) -> None:
        """Memory for `capacity` slots of a retrieval layer, where its buffers stand."""
        for buffer in self.growing.values():
            buffer.commit(capacity)

    @property
    def memory_bytes(self) -> int:
        if self.growing:
            return sum(buffer.memory_bytes for buffer in self.growing.values())
        return sum(buffer.nbytes for buffer in self.buffers.values()) if self.is_initialized else 0

    @in_normal_mode
    def select_rows(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was. In place while the batch stays the same, so that addresses do not change."""
        held = self.slots if self.window else min(self.rows.longest, self.slots)
        index = index.to(self.device)
        if self.key_offset is not None:
            chosen = self.key_offset.index_select(0, index)
            self.key_offset = self.key_offset.copy_(chosen) if len(index) == len(self.key_offset) else chosen
        for name, buffer in self.buffers.items():
            chosen = buffer[:, :, :held].index_select(0, index)
            if len(index) != buffer.shape[0]:
                if self.growing:
                    self.growing[name] = self.growing[name].with_batch(len(index))
                    buffer = self.growing[name].tensor
                else:
                    buffer = buffer.new_empty(len(index), *buffer.shape[1:])
                self.buffers[name] = buffer
            buffer[:, :, :held] = chosen
