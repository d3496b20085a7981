"""Key and value buffers that grow where they stand: addresses for the longest context at once, memory as it is needed.

A cache that grows by copying needs the old and the new buffer at once and moves every key; a cache made for the longest context
pays for it from the first token. Here the tensor stays where it is, so that captured graphs and pointers stay valid, and memory
is committed in pages: 2 MiB on CUDA, 4 KiB on most CPUs.
"""

import functools
import threading
from collections.abc import Iterable
from typing import NoReturn

import torch
from torch import Tensor

from .. import _C

_POOL_STREAMS = 32  # of a device; torch hands them out in turn


class ReservedTensor(Tensor):
    """All slots of a `GrowingBuffer`, most of them without memory: for ops, which are told how many slots hold tokens.

    It is a plain tensor to every op. What would read all of it or save its storage (printing, pickling, copying, sharing) is
    refused, or says so in place of numbers.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, *, tensor_contents=None) -> str:
        shape = ", ".join(map(str, self.shape))
        return f"<addresses for [{shape}] {self.dtype} on {self.device}; GrowingBuffer.held() copies what has memory>"

    def _refuse(self, *args, **kwargs) -> NoReturn:
        raise TypeError(f"{self!r} cannot be copied, saved, shared or listed as a whole: most of it has no memory")

    __reduce_ex__ = __deepcopy__ = share_memory_ = clone = tolist = _refuse


class GrowingBuffer:
    """Keys or values of one layer at fixed addresses, of which the first slots of every row have memory.

    It is for several threads: growing, shrinking and copying out wait for each other. On CUDA memory is given back when the
    device has done all queued work. While a stream capture is under way that cannot be waited for: the memory is kept, and goes
    with the next release, or, where the buffer is deleted, with the next call that makes, grows or shrinks any buffer.

    `tensor` [batch, num_kv_heads, slots, head_dim] is all of it, for ops only: writing where there is no memory is a crash of
    the process (CPU) or of the CUDA context, and on CUDA so is reading; on the CPU what has no memory reads as zeros. `held` is
    a copy of what has memory, for everyone else.

    `tensor` has `max_slots` slots, rounded up to whole pages. In memory the order is [batch, slots, num_kv_heads, head_dim], so
    that the slots in use are one region per row of the batch, and a row costs at most one page more than its tokens. In the order
    of `tensor` every head would be a region of its own: with 8 KV heads, 16 layers and 2 MiB pages at least 512 MiB for keys and
    values, instead of 64.

    `copy.deepcopy` and `pickle` take what is committed, row by row, and no addresses.

    Args:
        batch, num_kv_heads, max_slots, head_dim: shape. Reserving slots takes addresses only, of which a process has 128 TiB: ask
            for what the model can hold, and `extend` when that is passed. Without head_dim (None) one number per slot, and no
            such dimension: the scales of a quantised cache.
        exact: whether `tensor` ends at max_slots instead of a whole page, for buffers of different widths side by side.
        dtype: of the elements.
        device: "cpu" or a CUDA device.

    Raises:
        ValueError: a size below 1, more addresses than there are, or a device without virtual memory.
        MemoryError: addresses beyond a limit of the process, which is named (RLIMIT_AS, vm.max_map_count); from `commit`,
            `commit_row` and `extend`, memory. What was committed before is untouched.

    Example:
        >>> keys = GrowingBuffer(1, 8, 1 << 20, 128, torch.bfloat16, "cuda")
        >>> keys.commit(4096)
        >>> keys.tensor[:, :, :4096].zero_()
        >>> keys.held().shape
        torch.Size([1, 8, 4096, 128])
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
        self.batch, self.num_kv_heads, self.head_dim, self.dtype, self.exact = batch, num_kv_heads, head_dim, dtype, exact
        self._token_bytes = num_kv_heads * width * dtype.itemsize
        self._row_slots = (0,) * batch
        self._lock = threading.RLock()
        if self.device.type == "cuda":
            _watch_captures(self.device.index)
        index = self.device.index if self.device.type == "cuda" else None
        self._use(_C.VirtualBuffer(batch, self._row_size(max_slots), index, self._token_bytes), max_slots)

    def _row_size(self, max_slots: int) -> int:
        """Bytes of a row of that many slots."""
        if (size := max_slots * self._token_bytes) > 1 << 60:
            raise ValueError(f"a growing buffer reserves at most 2^60 bytes, got {max_slots} slots of {self._token_bytes} bytes")
        return size

    def _use(self, buffer: _C.VirtualBuffer, max_slots: int) -> None:
        """Goes over to `buffer` in one step: an interrupt comes before or after it."""
        slots = max_slots if self.exact else buffer.row_stride // self._token_bytes
        width = 1 if self.head_dim is None else self.head_dim
        dims = 3 if self.head_dim is None else 4
        shape = (self.batch, self.num_kv_heads, slots, width)[:dims]
        strides = (buffer.row_stride // self.dtype.itemsize, width, self.num_kv_heads * width, 1)[:dims]
        with torch.inference_mode(False):  # a buffer outlives the mode it was made in
            if self.device.type == "cpu":
                flat = torch.frombuffer(buffer, dtype=torch.uint8)
            else:
                self._commit(buffer, 1, 0)  # torch asks the driver whose memory an address is, which needs some memory there
                flat = torch.as_tensor(buffer, device=self.device)
            tensor = flat.view(self.dtype).as_strided(shape, strides).as_subclass(ReservedTensor)
        self._memory = buffer, tensor, max_slots

    @property
    def tensor(self) -> ReservedTensor:
        """All slots [batch, num_kv_heads, slots, head_dim], for ops only; keeps the memory alive. `extend` makes another one."""
        return self._memory[1]

    @property
    def max_slots(self) -> int:
        return self._memory[2]

    @property
    def _buffer(self) -> _C.VirtualBuffer:
        return self._memory[0]

    @property
    def row_slots(self) -> tuple[int, ...]:
        """Committed slots of each row."""
        return self._row_slots

    @property
    def slots(self) -> int:
        """Slots that are committed in every row."""
        return min(self._row_slots)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory in use: whole pages."""
        return self._buffer.committed_bytes

    def __repr__(self) -> str:
        shape = [self.batch, self.num_kv_heads, self.slots, *([] if self.head_dim is None else [self.head_dim])]
        return (
            f"GrowingBuffer({shape} {self.dtype} on {self.device}, at most {self.max_slots} slots, {self.memory_bytes:,} bytes)"
        )

    def _row_bytes(self, slots: int, call: str = "commit") -> int:
        """Bytes of a row that kernels touch while it holds `slots` tokens."""
        if not 0 <= slots <= self.max_slots:
            raise ValueError(f"{call} takes 0 to {self.max_slots} slots, got {slots}")
        if slots and self.device.type == "cuda":
            slots = min(_C.readable_slots(slots, self.batch, self.num_kv_heads), self.tensor.shape[2])
        return slots * self._token_bytes

    def _commit(self, buffer: _C.VirtualBuffer, row_bytes: int, row: int | None = None) -> None:
        def commit() -> None:
            buffer.commit(row_bytes) if row is None else buffer.commit_row(row, row_bytes)

        try:
            commit()
        except MemoryError:
            if self.device.type != "cuda":
                raise
            torch.cuda.empty_cache()  # memory that torch keeps for reuse counts as used
            commit()

    def _check_row(self, row: int) -> int:
        if not 0 <= row < self.batch:
            raise ValueError(f"the buffer has rows 0 to {self.batch - 1}, got {row}")
        return row

    def commit(self, slots: int) -> None:
        """Makes the first `slots` slots of every row usable; fewer than before change nothing. What they hold stays.

        Enough for attention on rows that hold `slots` tokens after the call. A ring is read whole, so commit it whole.
        """
        with self._lock:
            row_bytes = self._row_bytes(slots)
            if slots > self.slots:
                self._commit(self._buffer, row_bytes)
                self._row_slots = tuple(max(held, slots) for held in self._row_slots)

    def commit_row(self, row: int, slots: int) -> None:
        """`commit` for one row: the others stay as they are, and may have no memory at all."""
        with self._lock:
            row_bytes = self._row_bytes(slots)
            if slots > self._row_slots[self._check_row(row)]:
                self._commit(self._buffer, row_bytes, row)
                self._row_slots = (*self._row_slots[:row], slots, *self._row_slots[row + 1 :])

    def row_memory(self, slots: int) -> int:
        """Bytes of memory that a row takes with `slots` committed: whole pages."""
        page = self._buffer.page_bytes
        return -(-self._row_bytes(slots, "row_memory") // page) * page

    def growth_bytes(self, slots: int, row: int | None = None) -> int:
        """Bytes of memory that `commit(slots)`, or `commit_row(row, slots)`, would take; see `check_free`."""
        with self._lock:
            row_bytes = self._row_bytes(slots)
            return self._buffer.growth(row_bytes) if row is None else self._buffer.row_growth(self._check_row(row), row_bytes)

    def shrink(self, slots: int, row: int | None = None) -> None:
        """Gives back the whole pages behind the first `slots` slots of every row, or of one. The addresses stay.

        Waits for the device. An interrupt leaves memory that counts as given back and is used again by the next `commit`. On
        CUDA memory is mapped in blocks of up to 16 pages, and what stays of a block moves: MemoryError where there is no room
        for it. All of a row can always go.
        """
        with self._lock:
            row_bytes = self._row_bytes(slots, "shrink")
            if row is None:
                self._row_slots = tuple(min(held, slots) for held in self._row_slots)
                self._buffer.shrink(row_bytes)
            else:
                kept = min(slots, self._row_slots[self._check_row(row)])
                self._row_slots = (*self._row_slots[:row], kept, *self._row_slots[row + 1 :])
                self._buffer.shrink_row(row, row_bytes)

    def release(self) -> None:
        """`shrink(0)`: forgets everything and gives all memory back."""
        self.shrink(0)

    def release_row(self, row: int) -> None:
        """`shrink(0, row)`: gives the memory of one row back, the others stay as they are."""
        self.shrink(0, row)

    def held(self, slots: int | None = None, row: int | None = None) -> Tensor:
        """A copy of the first `slots` slots (None: all that are committed) of every row, or of one, with a storage of its own.

        [batch or 1, num_kv_heads, slots, head_dim]. It takes as much memory as it shows, and stays what it is when the buffer
        goes on. Raises ValueError for slots that are not committed.
        """
        with self._lock:
            rows = slice(None) if row is None else slice(self._check_row(row), row + 1)
            committed = min(self._row_slots[rows])
            slots = committed if slots is None else slots
            if not 0 <= slots <= committed:
                raise ValueError(f"{committed} slots are committed, {slots} were asked for")
            with torch.inference_mode(False), torch.no_grad():
                return self.tensor[rows, :, :slots].clone()

    def copy_row(self, source: int, row: int, slots: int) -> None:
        """The first `slots` slots of row `row` become those of row `source`. Raises ValueError if not all are committed."""
        with self._lock:
            committed = min(self._row_slots[self._check_row(source)], self._row_slots[self._check_row(row)])
            if not 0 <= slots <= committed:
                raise ValueError(f"{committed} slots are committed in rows {source} and {row}, {slots} were to be copied")
            with torch.inference_mode(False), torch.no_grad():
                self.tensor[row, :, :slots].copy_(self.tensor[source, :, :slots])

    def extend(self, max_slots: int) -> None:
        """Moves to longer rows at new addresses; what is committed stays committed and keeps what it holds.

        `tensor` is another one afterwards: what was made of the old one (arguments, captured graphs) must be made anew. On CUDA
        the same memory is put under the new addresses; on the CPU it is copied. Fewer slots than there are change nothing.
        """
        with self._lock:
            if max_slots <= self.max_slots:
                return
            old = self._buffer
            self._use(old.extended(self._row_size(max_slots)), max_slots)
            old.release()

    def with_batch(self, batch: int) -> "GrowingBuffer":
        """Another one for another number of rows, with memory for as many slots (of the longest row) and nothing in it yet."""
        other = GrowingBuffer(batch, self.num_kv_heads, self.max_slots, self.head_dim, self.dtype, self.device, self.exact)
        other.commit(max(self._row_slots))
        return other

    def _contents(self) -> tuple[tuple, list[Tensor]]:
        """Arguments for another one like this, and what each row holds."""
        with self._lock:
            geometry = (self.batch, self.num_kv_heads, self.max_slots, self.head_dim, self.dtype, self.device, self.exact)
            return geometry, [self.held(row=row) for row in range(self.batch)]

    def __deepcopy__(self, memo: dict) -> "GrowingBuffer":
        """Copies what is committed. References to `tensor` that are copied later become references to the copy's."""
        tensor, other = self.tensor, _restored(*self._contents())
        memo[id(self)], memo[id(tensor)] = other, other.tensor
        return other

    def __reduce__(self) -> tuple:
        return _restored, self._contents()


def _restored(geometry: tuple, rows: list[Tensor]) -> GrowingBuffer:
    buffer = GrowingBuffer(*geometry)
    for row, held in enumerate(rows):
        buffer.commit_row(row, held.shape[2])
        buffer.tensor[row : row + 1, :, : held.shape[2]] = held
    return buffer


@functools.cache
def _watch_captures(device: int) -> None:
    """Tells the core torch's streams, on which captures may be under way when a buffer goes: it must not wait for them then."""
    _C.watch_captures(device, sorted({torch.cuda.Stream(device).cuda_stream for _ in range(_POOL_STREAMS)}))


def free_bytes(device: torch.device) -> int:
    """Bytes that new tensors can take on a device.

    On CUDA its free memory and what torch holds unused; on the CPU what the system says is available, and no more than what the
    memory limits of this process's control groups leave.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return _C.host_free_bytes()


def check_free(wanted: Iterable[tuple[GrowingBuffer, int]]) -> None:
    """Raises MemoryError unless `buffer.commit(slots)` of all pairs (buffer, slots) fits into free memory. Commits nothing."""
    needed: dict[torch.device, int] = {}
    for buffer, slots in wanted:
        needed[buffer.device] = needed.get(buffer.device, 0) + buffer.growth_bytes(slots)
    check_free_bytes(needed)


def check_free_bytes(needed: dict[torch.device, int]) -> None:
    """Raises MemoryError unless so many bytes are free on each device."""
    for device, size in needed.items():
        if size and size > (free := free_bytes(device)):
            raise MemoryError(f"out of memory: {size:,} bytes are needed on {device}, {free:,} are free; nothing was changed")
