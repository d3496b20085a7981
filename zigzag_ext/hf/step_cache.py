"""What a compiled decode step sees of a ZigzagCache: tensors at fixed addresses, and nothing that changes from step to step."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ..attention import ops
from ..cache import ZigzagCache
from ..cache.layer import ZigzagLayer
from ..cache.mixed import MixedLayer


class _Shared:
    """Read by all layers: tokens held and padding, [batch] int32 (padding may be None), columns seen (0-d int64), scratch."""

    def __init__(self, seq_lens: Tensor, pad: Tensor | None, workspaces: dict[tuple, Tensor]):
        self.seq_lens, self.pad, self.workspaces = seq_lens, pad, workspaces
        self.columns = torch.zeros((), dtype=torch.int64, device=seq_lens.device)


class _Part:
    """Buffers of one kind: those of a whole layer, or of some KV heads of it."""

    def __init__(self, part: ZigzagLayer):
        buffers = part.buffers
        self.keys, self.values, self.heads = buffers["keys"], buffers["values"], part.head_numbers
        self.key_offset = part.key_offset
        self.own = {"sink": part.sink, "window": part.window}
        self.own |= {"k_scale": buffers.get("key_scales"), "v_scale": buffers.get("value_scales")}
        if not part.window:  # one compilation for every capacity
            for buffer in buffers.values():
                torch._dynamo.maybe_mark_dynamic(buffer, 2)

    def cached(self, k: Tensor) -> Tensor:
        """New keys as they are cached: see `zigzag_ext.cache.smoothing`."""
        return k if self.key_offset is None else k - self.key_offset


class StepLayer(CacheLayerMixin):
    """One layer of a StepCache. `update` hands the new token on; `attend` attends and appends it, like `ZigzagLayer.attend`."""

    is_sliding = False

    def __init__(self, layer: ZigzagLayer | MixedLayer, shared: _Shared):
        super().__init__()
        self.parts = [_Part(part) for part in layer.parts]
        self.shared = shared
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise RuntimeError("a decode step runs on a cache that holds a prompt, this one is empty")

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        shared = self.shared
        workspace = shared.workspaces[q.shape[1], k.shape[1], q.shape[3]]
        options = {"pad": shared.pad, "scale": scale, "workspace": workspace}
        if len(self.parts) == 1:
            part = self.parts[0]
            return ops.attention(q, part.cached(k), v, part.keys, part.values, shared.seq_lens, **options, **part.own)[0]
        out, lse = ops.new_output(q)
        for part in self.parts:
            tensors = (part.keys, part.values, shared.seq_lens, part.heads, out, lse)
            ops.attention_heads(q, part.cached(k), v, *tensors, **options, **part.own)
        return out

    def get_seq_length(self) -> Tensor:
        """A tensor: right in arithmetic on the device, and the compiler's error where a model wants it on the host."""
        return self.shared.columns

    def get_mask_sizes(self, query_length: int) -> tuple[Tensor, int]:
        return self.shared.columns + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older transformers


class StepCache(Cache):
    """The buffers of `cache`, after its first forward. `refresh` goes before a step, `advance` behind it."""

    def __init__(self, cache: ZigzagCache):
        rows, self.device = cache.layers[0].rows, cache.layers[0].device
        workspaces = {key[:3]: workspace for key, workspace in rows.workspaces.items()}
        shared = _Shared(cache.seq_lens, cache.padding, workspaces)
        super().__init__(layers=[StepLayer(layer, shared) for layer in cache.layers])
        self.num_columns = 0  # what `columns` is on the device

    def refresh(self, cache: ZigzagCache) -> None:
        """Copies in what the forward under way has noted. A step that follows another finds all of it in place."""
        shared, padding, columns = self.layers[0].shared, cache.padding, cache.get_seq_length()
        if padding is not shared.pad:
            shared.pad.copy_(padding)
        if columns != self.num_columns:
            shared.columns.fill_(columns)
            self.num_columns = columns

    def advance(self) -> None:
        """Prepares the next step while the device is busy with this one."""
        self.layers[0].shared.columns.add_(1)
        self.num_columns += 1
