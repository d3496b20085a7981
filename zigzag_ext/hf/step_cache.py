"""What a compiled decode step sees of a ZigzagCache: tensors at fixed addresses, and nothing that changes from step to step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..attention.chunk import Chunk, LogitTerms
from ..attention.store import attend
from ..cache import ZigzagCache
from ..cache.forward import Forward
from ..cache.layer import ZigzagLayer
from ..cache.states import HybridLayer, StateLayer, WithStates

UNKNOWN = -1


class _Shared:
    """Read by all layers: the chunk, whose lengths and padding are [batch] int32, and columns seen (0-d int64)."""

    def __init__(self, chunk: Chunk):
        self.chunk = chunk
        self.columns = torch.zeros((), dtype=torch.int64, device=chunk.seq_lens[0].device)


class StepLayer(CacheLayerMixin):
    """One layer of a StepCache. `update` hands the new token on; `attend` attends and appends it, like `ZigzagLayer.attend`."""

    is_sliding = False

    def __init__(self, layer: ZigzagLayer, shared: _Shared, through: tuple[int, int] | None):
        super().__init__()
        self.stores, self.shared = [store.for_compiler(through) for store in layer.stores], shared
        self.native_window = layer.native_window
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise RuntimeError("a decode step runs on a cache that holds a prompt, this one is empty")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, terms: LogitTerms, is_last: bool = True) -> Tensor:
        return attend(self.stores, q, k, v, scale, self.shared.chunk, terms, is_last)

    def get_seq_length(self) -> Tensor:
        """A tensor: right in arithmetic on the device, and the compiler's error where a model wants it on the host."""
        return self.shared.columns

    def get_mask_sizes(self, query_length: int) -> tuple[Tensor, int]:
        return self.shared.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older transformers


class HybridStepLayer(StepLayer, WithStates):
    """A layer of a StepCache with a state beside its keys."""

    def __init__(self, layer: HybridLayer, *args):
        super().__init__(layer, *args)
        self.states = layer.states.for_compiler()


class StepCache(Cache):
    """The buffers of a cache, after its first forward. `refresh` goes before a step, `advance` behind it.

    seq_lens, pad, rows: [batch] int32 each on the device, what the steps read: see `Chunk`, whose cache_rows `rows` are. through:
    sink and window that retrieval layers are read through; None: in full.
    """

    def __init__(
        self,
        cache: ZigzagCache,
        seq_lens: tuple[Tensor, ...],
        pad: Tensor | None,
        through: tuple[int, int] | None = None,
        rows: Tensor | None = None,
    ):
        self.device, self.through = cache.attention_layers[0].device, through
        chunk = Chunk(seq_lens, pad, cache.state.workspace(self.device), decodes=True, cache_rows=rows)
        self.shared = shared = _Shared(chunk)

        def step_layer(layer: ZigzagLayer | StateLayer):
            if isinstance(layer, StateLayer):
                return layer.for_compiler()
            return (HybridStepLayer if isinstance(layer, HybridLayer) else StepLayer)(layer, shared, through)

        super().__init__(layers=[step_layer(layer) for layer in cache.layers])
        self.state_tensors = [tensor for states in cache.states for tensor in states.tensors.values()]
        self.sources, self.is_last = cache.state.sources, [cache.state.is_last(i) for i in range(len(cache.state.sources))]
        self.shared_layers: dict = {}  # where Gemma 3n in transformers 5.4 puts the keys that later layers read
        self.num_columns = 0  # what `columns` is on the device, UNKNOWN while it changes
        self.rows: Tensor | None = None  # what the rows were copied from

    @classmethod
    def of(cls, forward: Forward) -> "StepCache":
        """For steps like `forward`.

        Steps without a mask have padding too, of zeros: they share their compiled graph with steps that have one. transformers
        leaves a mask of ones out, or does not.
        """
        cache, device = forward.cache, forward.cache.attention_layers[0].device
        lengths, padding, rows = forward.state.lengths_on(device), forward.pad_on(device), forward.rows_on(device)
        if rows is not None:
            return cls(cache, lengths, None, rows=rows.clone())
        return cls(cache, lengths, torch.zeros_like(lengths[0]) if padding is None else padding)

    def was_given(self, layer: int) -> bool:
        return True

    def native_window(self, layer: int) -> int:
        return self.layers[self.sources[layer]].native_window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, terms: LogitTerms) -> Tensor:
        return self.layers[self.sources[layer]].attend(q, k, v, scale, terms, self.is_last[layer])

    def refresh(self, forward: Forward) -> None:
        """Copies in what the forward under way has noted. A step that follows another finds all of it in place."""
        shared, padding, columns = self.shared, forward.pad_on(self.device), forward.columns
        if (rows := forward.rows_on(self.device)) is not self.rows:
            shared.chunk.cache_rows.copy_(rows)
            self.rows = rows
        if padding is not None and padding is not shared.chunk.pad:
            shared.chunk.pad.copy_(padding)
        if columns != self.num_columns:
            self.num_columns = UNKNOWN
            shared.columns.fill_(columns)
            self.num_columns = columns

    def advance(self) -> None:
        """Prepares the next step while the device is busy with this one."""
        columns, self.num_columns = self.num_columns + 1, UNKNOWN
        self.shared.columns.add_(1)
        self.num_columns = columns

    @contextmanager
    def states_kept(self) -> Iterator[None]:
        """Around a step that is not to count: keys are written where the next step writes them again, states are put back."""
        held = [tensor.clone() for tensor in self.state_tensors]
        yield
        for tensor, before in zip(self.state_tensors, held, strict=True):
            tensor.copy_(before)
