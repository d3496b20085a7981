"""ZigzagLayer: the cache of one layer of a ZigzagCache, a full buffer, a ring, or one of each for heads of both kinds."""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..attention.chunk import NO_TERMS, LogitTerms
from ..attention.store import LayerStore, attend
from .rows import Rows
from .state import Addresses, CacheState, locked


class ZigzagLayer(CacheLayerMixin):
    """The stores of one layer, allocated at first use from the keys: one, or two with different heads (a mixed layer).

    Nothing of a mixed layer is gathered, split or joined, and no weight is permuted: each call is told the numbers of its heads.
    Layers with heads of both kinds are DuoAttention's (https://arxiv.org/abs/2410.10819).
    """

    is_compileable = False
    is_sliding = False  # mask sizes are the same for every layer: masks are never built

    def __init__(self, state: CacheState, index: int, stores: list[LayerStore], native_window: int = 0):
        self.is_initialized = False  # instead of the base class, whose constructor sets keys and values
        self.state, self.index, self.stores = state, index, stores
        self.native_window = native_window  # of the model itself, in tokens; 0: its attention is full

    def __repr__(self) -> str:
        if len(self.stores) == 1:
            return repr(self.stores[0])
        return "mixed(" + ", ".join(f"{store!r} {store.heads}" for store in self.stores) + ")"

    @property
    def keys(self) -> Tensor | None:
        """[batch, num_kv_heads, slots, head_dim] see `LayerStore.keys`."""
        return self._only.keys

    @property
    def values(self) -> Tensor | None:
        return self._only.values

    @property
    def _only(self) -> LayerStore:
        if len(self.stores) > 1:
            raise AttributeError(f"layer {self.index} has heads of both kinds: look at its stores one by one")
        return self.stores[0]

    @property
    def slots(self) -> int:
        """Slots per KV head that are allocated; of a mixed layer on average, rounded up."""
        if len(self.stores) == 1:
            return self.stores[0].capacity
        heads = [len(store.heads) for store in self.stores]
        return -(-sum(store.capacity * n for store, n in zip(self.stores, heads, strict=True)) // sum(heads))

    @property
    def sink(self) -> int:
        return self._only.sink

    @property
    def window(self) -> int:
        """0 unless all heads stream: it grows like a retrieval layer otherwise."""
        return min(store.window for store in self.stores)

    @property
    def device(self) -> torch.device:
        return self.stores[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.stores[0].dtype

    @property
    def memory_bytes(self) -> int:
        return sum(store.memory_bytes for store in self.stores)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back: always in a retrieval layer, in a ring as many as it has slots for."""
        return all(not store.window or store.rollback for store in self.stores)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Device, dtype and the local number of heads come from the keys, so it works under device_map and tensor parallelism."""
        state = self.state
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"layer {self.index}: keys {tuple(key_states.shape)} and values {tuple(value_states.shape)} must have one shape"
            )
        planned = sum(len(store.heads or ()) for store in self.stores)
        if planned and key_states.shape[1] != planned:
            raise ValueError(
                f"layer {self.index}: the plan is for {planned} KV heads, the keys have {key_states.shape[1]}; under tensor "
                "parallelism plans of whole layers are served"
            )
        if state.batch is None:
            state.start(key_states.shape[0])
        for store in self.stores:
            store.allocate(key_states, state.capacity, state.max_len, keeps=state.stores, expected=state.expected)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Returns the new keys and values as they are; `attend` appends them. Raises outside an enabled model's forward."""
        forward = self.state.forward
        if forward is None:
            raise RuntimeError("a ZigzagCache works only with zigzag attention: call zigzag_ext.enable(model, plan) first")
        forward.given.add(self.index)
        return key_states, value_states

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        terms: LogitTerms = NO_TERMS,
        reader: int | None = None,
    ) -> Tensor:
        """Attention of the chunk over this layer and itself, then append. Returns out [batch, num_q_heads, q_len, head_dim].

        reader: the model's layer that attends, if it is another one than this, whose new keys and values are those of this one.
        """
        number = self.index if reader is None else reader
        with self.state.lock:  # until it has written where it may
            forward = self.state.forward
            self.state.check_open(forward)
            if self.is_initialized and (self.dtype, self.device) != (k.dtype, k.device):
                self._follow(k)
            chunk = forward.chunk(number, k)
            if not self.is_initialized:
                self.lazy_initialization(k, v)
            if forward.observes and not self.window:
                if terms.softcap:
                    raise ValueError("prompts of layers with soft-capped logits cannot be compressed")
                forward.observe(self.index, q, q.shape[3] ** -0.5 if scale is None else scale)
            out = attend(self.stores, q, k, v, scale, chunk, terms, self.state.is_last(number))
            forward.attended.add(number)
            return out

    def _follow(self, k: Tensor) -> None:
        """Lets go of buffers that are not of the dtype and device of new keys. Raises ValueError if they hold tokens."""
        if self.state.columns:
            raise ValueError(
                f"layer {self.index} of the cache holds {str(self.dtype)[6:]} keys on {self.device}, the model now gives "
                f"{str(k.dtype)[6:]} on {k.device}: reset() the cache, or use the model as it was"
            )
        self.drop()
        self.state.addresses = Addresses()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        forward = self.state.forward
        return self.state.columns if forward is None else forward.columns

    def get_max_length(self) -> int:
        """Most tokens a row can hold: `max_len`, or -1 (no limit) for a ring or a growing cache."""
        return -1 if self.window or self.state.max_len is None else self.state.max_len

    get_max_cache_shape = get_max_length

    def is_whole(self, rows: Rows) -> bool:
        """Whether all that `rows` show is there, after what was written ahead of them."""
        if any(rows.lack(self.state.left_out[store.lengths]) for store in self.stores if store.lengths):
            return False
        return all(store.is_whole(*pair) for store in self.stores if store.window for pair in rows.shown)

    @locked
    def reset(self) -> None:
        self.state.forget(self.state.batch)

    def release(self) -> None:
        """Gives the memory of a retrieval layer back and keeps its addresses. Waits for the device."""
        for store in self.stores:
            store.release()

    def drop(self) -> None:
        self.is_initialized = False  # first: an interrupt below must not leave a layer that seems to have buffers
        for store in self.stores:
            store.drop()

    def grow(self, capacity: int) -> None:
        """Memory for `capacity` tokens of a retrieval layer, as `CacheState.capacity` counts them."""
        for store in self.stores:
            store.grow(self.state.slots_for(capacity, store))

    def select_rows(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was; as many rows as before, in place, so that addresses do not change."""
        for store in self.stores:
            store.select_rows(index, self.state.longest)

    def with_rows(self, index: Tensor) -> list[LayerStore]:
        """What `take` then exchanges for what there is: row i has what row index[i] has, for another number of rows."""
        return [store.with_rows(index, self.state.longest) for store in self.stores]

    def take(self, stores: list[LayerStore]) -> None:
        self.stores = stores

    def memory_with_rows(self, batch: int) -> list[tuple[torch.device, int]]:
        """Bytes of memory that `with_rows` takes for `batch` rows, and where."""
        return [(store.device, store.bytes_with_rows(batch)) for store in self.stores if store.is_allocated]
