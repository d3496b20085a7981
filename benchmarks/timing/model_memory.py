"""Bytes of weights, of a cache of any kind, and of the peak."""

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> int:
    """Of a plain tensor, or of the parts of a quantised one."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def weight_bytes(model) -> int:
    """Of all parameters; tied ones count once."""
    return sum(map(tensor_bytes, model.parameters()))


def kv_bytes(cache) -> int:
    """Memory of a ZigzagCache, a DuoAttention re-creation, or a cache of transformers."""
    if all(hasattr(layer, "memory_bytes") for layer in cache.layers):
        return sum(layer.memory_bytes for layer in cache.layers)
    return sum(buffer.untyped_storage().nbytes() for layer in cache.layers for buffer in (layer.keys, layer.values))


def peak_bytes(model, cache) -> int:
    """Memory in use at most since `torch.cuda.reset_peak_memory_stats()`, weights and cache included; 0 on a CPU.

    Torch does not count the buffers of a ZigzagCache that grow.
    """
    if model.device.type != "cuda":
        return 0
    stores = [store for layer in cache.layers for store in getattr(layer, "stores", ())]
    return torch.cuda.max_memory_allocated() + sum(store.memory_bytes for store in stores if store.growing)
