"""Key and value buffers that grow where they stand: addresses for the longest context at once, memory as it is needed.

A cache that grows by copying needs the old and the new buffer at once and moves every key; a cache made for the longest context
pays for it from the first token. Here the tensor never moves, so that captured graphs and pointers stay valid, and memory is
committed in pages: 2 MiB on CUDA, 4 KiB on most CPUs.
"""

import torch
from torch import Tensor

from .. import _C


class GrowingBuffer:
    """Keys or values of one layer: `tensor` [batch, num_kv_heads, slots, head_dim] at fixed addresses.

    It has `max_slots` slots, rounded up to whole pages. In memory the order is [batch, slots, num_kv_heads, head_dim], so that
    the slots in use are one region per row of the batch, and a row costs at most one page more than its tokens. In the order of
    `tensor` every head would be a region of its own: with 8 KV heads, 16 layers and 2 MiB pages at least 512 MiB for keys and
    values, instead of 64.

    Only the slots passed to `commit` have memory. Reading or writing others is a crash of the process (CPU) or of the CUDA
    context, also by printing, copying or comparing the whole `tensor`: slice it to the committed slots first.

    Args:
        batch, num_kv_heads, max_slots, head_dim: shape; reserving slots is free, 64 bits of addresses are many.
            Without head_dim (None) one number per slot, and no such dimension: the scales of a quantised cache.
        exact: whether `tensor` ends at max_slots instead of a whole page, for buffers of different widths side by side.
        dtype: of the elements.
        device: "cpu" or a CUDA device.

    Raises:
        ValueError: a size below 1, more addresses than there are, or a device without virtual memory.
        MemoryError: from `commit`; what was committed before is untouched.

    Example:
        >>> keys = GrowingBuffer(1, 8, 1 << 20, 128, torch.bfloat16, "cuda")
        >>> keys.commit(4096)
        >>> keys.tensor[:, :, :4096].zero_()
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        max_slots: int,
        head_dim: int | None,
        dtype: torch.dtype,
        device: torch.device | str,
        exact: bool = False,
    ):
        width = 1 if head_dim is None else head_dim
        shape = (batch, num_kv_heads, max_slots, width)
        if min(shape) < 1:
            raise ValueError(f"a growing buffer needs batch, num_kv_heads, max_slots and head_dim of at least 1, got {shape}")
        self.device = torch.device(device)
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"a growing buffer lives on cpu or cuda, got {self.device}")
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.slots, self.max_slots = 0, max_slots  # committed so far and at most
        self._token_bytes, self._exact = num_kv_heads * width * dtype.itemsize, exact
        self._buffer = _C.VirtualBuffer(
            batch, max_slots * self._token_bytes, self.device.index if self.device.type == "cuda" else None, self._token_bytes
        )
        slots = max_slots if exact else self._buffer.row_stride // self._token_bytes
        dims = 3 if head_dim is None else 4
        shape = (batch, num_kv_heads, slots, width)[:dims]
        strides = (self._buffer.row_stride // dtype.itemsize, width, num_kv_heads * width, 1)[:dims]
        with torch.inference_mode(False):  # a buffer outlives the mode it was made in
            self.tensor = self._all_elements(dtype).as_strided(shape, strides)

    def _all_elements(self, dtype: torch.dtype) -> Tensor:
        """The reservation as a flat tensor, which keeps the buffer alive."""
        if self.device.type == "cpu":
            return torch.frombuffer(self._buffer, dtype=torch.uint8).view(dtype)
        self._commit(1)  # torch asks the driver whose memory an address is, which needs some memory there
        return torch.as_tensor(self._buffer, device=self.device).view(dtype)

    def _commit(self, row_bytes: int) -> None:
        try:
            self._buffer.commit(row_bytes)
        except MemoryError:
            if self.device.type != "cuda":
                raise
            torch.cuda.empty_cache()  # memory that torch keeps for reuse counts as used
            self._buffer.commit(row_bytes)

    def commit(self, slots: int) -> None:
        """Makes the first `slots` slots of every row usable; fewer than before change nothing. What they hold stays.

        Enough for attention on rows that hold `slots` tokens after the call. A ring is read whole, so commit it whole.
        """
        batch, num_kv_heads, reserved = self.tensor.shape[:3]
        if not 0 <= slots <= self.max_slots:
            raise ValueError(f"commit takes 0 to {self.max_slots} slots, got {slots}")
        if slots <= self.slots:
            return
        read = _C.readable_slots(slots, batch, num_kv_heads) if self.device.type == "cuda" else slots
        self._commit(min(read, reserved) * self._token_bytes)
        self.slots = slots

    def with_batch(self, batch: int) -> "GrowingBuffer":
        """Another one for another number of rows, with memory for as many slots and nothing in it yet."""
        _, num_kv_heads, _, head_dim = (*self.tensor.shape, None)[:4]
        geometry = (batch, num_kv_heads, self.max_slots, head_dim)
        other = GrowingBuffer(*geometry, self.tensor.dtype, self.device, self._exact)
        other.commit(self.slots)
        return other

    def __deepcopy__(self, memo: dict) -> "GrowingBuffer":
        """Copies what is committed. References to `tensor` that are copied later become references to the copy's."""
        other = self.with_batch(self.tensor.shape[0])
        other.tensor[:, :, : self.slots] = self.tensor[:, :, : self.slots]
        memo[id(self)], memo[id(self.tensor)] = other, other.tensor
        return other

    def release(self) -> None:
        """Gives all memory back, after the device has done all queued work. The tensor keeps its addresses, without memory."""
        self._buffer.release()
        self.slots = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory in use: whole pages."""
        return self._buffer.committed_bytes
