"""SharedKeys: layers that read the KV cache of an earlier layer, as the last ones of Gemma 3n and Gemma 4."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..attention.chunk import LogitTerms
from .columns import back_in_order, in_order

if TYPE_CHECKING:
    from .forward import Forward


class SharedKeys:
    """The new keys and values of a piece, as they came with the layer that has them, until its last reader is through.

    `LayerStore.attend` says why all of them may attend one cache in turn. Nothing here refers to the forward that it is part of:
    a cycle would keep the memory of the cache until a collection.
    """

    def __init__(self):
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # by layer, in the order that the ops take

    def keep(self, forward: "Forward", layer: int, k: Tensor, v: Tensor) -> None:
        """Keeps k, v [batch, num_kv_heads, q_len, head_dim] of `layer` if others read them."""
        if not forward.state.is_last(layer):
            self.kept[layer] = k, v

    def attend(self, forward: "Forward", layer: int, q: Tensor, scale: float | None, terms: LogitTerms) -> Tensor:
        """Attention of a layer without keys: out like q [batch, num_q_heads, q_len or fewer columns, head_dim].

        The layer may be on another device. It may bring keys of its own, which count for nothing (Gemma 3n in transformers 5.4,
        without a cache). And it may have the last columns only, where no other logits are wanted (Gemma 4 in transformers 5.24):
        zeros attend in the place of the others.
        """
        source, columns, device = forward.state.sources[layer], q.shape[2], q.device
        if source not in self.kept:
            raise RuntimeError(f"layer {layer} reads the KV cache of layer {source}, which has not attended before it")
        k, v = self.kept[source]
        q = q.to(k.device)
        if columns < forward.q_len:
            q = F.pad(q, (0, 0, forward.q_len - columns, 0))
        out = forward.cache.layers[source].attend(in_order(q, forward.order), k, v, scale, terms, layer)
        if forward.state.is_last(layer):
            del self.kept[source]
        return back_in_order(out, forward.order)[:, :, -columns:].to(device)
