"""The cache of a layer with KV heads of both kinds, as DuoAttention has them (https://arxiv.org/abs/2410.10819)."""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ..attention import ops
from .state import Rows


class MixedLayer(CacheLayerMixin):
    """Two `ZigzagLayer`s, one per kind, each with its own heads: two attention calls write into one output.

    Nothing is gathered, split or joined, and no weight is permuted: each call is told the numbers of its heads.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    window = 0  # it grows like a retrieval layer

    def __init__(self, rows: Rows, index: int, parts: list):
        super().__init__()
        self.rows, self.index, self.parts = rows, index, parts

    def __repr__(self) -> str:
        return "mixed(" + ", ".join(f"{part!r} {part.heads}" for part in self.parts) + ")"

    @property
    def slots(self) -> int:
        """Slots per KV head, on average, rounded up."""
        held = [part.slots * len(part.heads) for part in self.parts]
        return -(-sum(held) // sum(len(part.heads) for part in self.parts))

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def memory_bytes(self) -> int:
        return sum(part.memory_bytes for part in self.parts)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        planned = sum(len(part.heads) for part in self.parts)
        if key_states.shape[1] != planned:  # under tensor parallelism
            raise ValueError(f"layer {self.index}: the plan is for {planned} KV heads, the keys have {key_states.shape[1]}")
        for part in self.parts:
            part.lazy_initialization(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self.parts[0].update(key_states, value_states)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """As `ZigzagLayer.attend`."""
        self.rows.check_chunk(self.index, k)
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        out, _ = ops.new_output(q)
        for part in self.parts:
            part.attend_part(q, k, v, scale, out)
        self.rows.attended.add(self.index)
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.rows.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.rows.columns

    def get_max_length(self) -> int:
        return max(part.get_max_length() for part in self.parts)

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.rows.forget()

    def release(self) -> None:
        for part in self.parts:
            part.release()

    def drop(self) -> None:
        for part in self.parts:
            part.drop()
        self.is_initialized = False

    def grow(self, capacity: int) -> None:
        for part in self.parts:
            part.grow(capacity)

    def select_rows(self, index: Tensor) -> None:
        for part in self.parts:
            part.select_rows(index)
