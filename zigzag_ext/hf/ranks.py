"""Tensor parallelism: processes ("ranks") that run one program, each with its part of the weights and of the heads."""

import torch
from torch import Tensor, nn


@torch.no_grad()  # where gradients are recorded, a DTensor's local part is made anew for each call
def local_tensors(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Parameters and buffers, each with what this process holds of it: a DTensor's local part, any other tensor itself.

    A DTensor has no memory of its own: its `data_ptr()` is 0, and it does not count what is written to its local part.
    """
    tensors = (tensor for group in (model.parameters(), model.buffers()) for tensor in group)
    return [(tensor, tensor.to_local() if hasattr(tensor, "to_local") else tensor) for tensor in tensors]
