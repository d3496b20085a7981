"""CacheState: what all layers of a ZigzagCache share, tokens held per row above all, on the device with a host mirror."""

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..attention import ops
from ..attention.store import MAX_TOKENS, LayerStore, in_normal_mode
from ..planning.plan import token_count
from .compression import PromptCompression
from .compression.observed import Observed
from .rows import Rows
from .tokens import HeldTokens

BROKEN = "call reset()"


def locked(method):
    """Of what has a `state`: one thread at a time changes a cache, so that none gives memory back that another writes to."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with self.state.lock:
            return method(self, *args, **kwargs)

    return run


class Addresses:
    """Stands for the present buffers: compiled steps are filed under it. A copy of a cache has addresses of its own."""

    def __deepcopy__(self, memo) -> "Addresses":
        return Addresses()


class CacheState:
    """Tokens held per row, never waited for: `seq_lens` on the devices, bounds of them on the host.

    batch: rows, None before the first forward. rows: what the host knows of each. capacity: tokens that retrieval layers have
    memory for, behind a compressed prompt those that came later, see `Rows.grown`. tokens: which tokens are held. observed: by
    layer, the last queries of a prompt that is to be compressed. left_out: [num_lengths, batch] int64, tokens by which `seq_lens`
    count less than their first row. mean_of_heads: of processes that share the heads of a layer out, the mean of what they have.
    """

    def __init__(
        self,
        max_len: int | None,
        stores: bool,
        sources: tuple[int, ...],
        compression: PromptCompression | None = None,
        num_lengths: int = 1,
        sink: int = 0,
    ):
        self.max_len, self.stores, self.compression, self.num_lengths = max_len, stores, compression, num_lengths
        self.sink = sink  # of the plan
        self.sources = sources  # of the model's layers, see `kv_sources`: the layers of the cache that they attend
        self.last_readers = {source: layer for layer, source in enumerate(sources)}
        self.expected: int | None = None  # tokens that the model was made for, if its config says so
        self.made_for = None  # plan, name and geometry of the model, and geometries of its layers
        self.num_forwards = 0
        self.prompt_end = 0  # columns of a prompt that comes in several forwards
        self.mean_of_heads: Callable[[Tensor], Tensor] | None = None
        self.lock = threading.RLock()
        self.start(None)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("lock", "mean_of_heads")}

    def __setstate__(self, values: dict) -> None:
        vars(self).update(values, lock=threading.RLock(), mean_of_heads=None)

    def check_open(self, forward) -> None:
        """Raises RuntimeError unless `forward` is the one under way."""
        if forward is None or self.forward is not forward:
            raise RuntimeError(
                "the ZigzagCache was emptied, changed or given to another forward while a forward on it was under way, which is "
                "void: use a cache in one forward at a time"
            )

    def start(self, batch: int | None) -> None:
        """Nothing is held and there are no buffers, for `batch` rows."""
        self.batch = None  # until all is as these rows need it: after an interrupt the next forward starts anew
        # [num_lengths, batch] int32, one copy per device that holds layers: tokens held per row, and then, for layers that may
        # leave tokens out, those that they hold. All of them advance alike.
        self.seq_lens: dict[torch.device, Tensor] = {}
        self.workspaces: dict[torch.device, Tensor] = {}
        self.step_pad: Tensor | None = None  # [batch] int32, of steps of one column
        self.addresses = Addresses()
        self.tokens = HeldTokens()
        self.forget(batch)
        self.batch = batch

    def forget(self, batch: int | None) -> None:
        """Nothing is held by any of `batch` rows; buffers stay."""
        self.changing = "reset() was interrupted"
        self.forward = None  # the Forward under way
        self.capacity, self.rows = 0, Rows.empty(batch)
        self.compressed = False
        self.observed: dict[int, Observed] = {}
        self.left_out = np.zeros((self.num_lengths, batch or 0), dtype=np.int64)
        self.tokens.cut(0)
        for lengths in self.seq_lens.values():
            lengths.zero_()
        self.changing: str | None = None  # what was under way, and so why the contents are not whole

    @property
    def columns(self) -> int:
        """Tokens seen per row, padding included, up to the end of the longest row."""
        return self.rows.columns

    @property
    def longest(self) -> int:
        """Tokens of the longest row, an upper bound."""
        return self.rows.longest

    def is_last(self, layer: int) -> bool:
        """Whether no layer of the model after `layer` attends the same layer of the cache."""
        return self.last_readers[self.sources[layer]] == layer

    def check(self) -> None:
        """Raises RuntimeError if the contents are not whole. Before anything but the forward under way uses the cache."""
        if self.forward is not None:  # it was interrupted at its opening or its end, and nothing has closed it
            self.forward.roll_back()
        if self.changing is not None:
            raise RuntimeError(f"{self.changing}, the ZigzagCache is not whole: {BROKEN}")

    @contextmanager
    def change(self, what: str) -> Iterator[None]:
        """A change in several steps: an exception or interrupt between them leaves the cache marked."""
        self.check()
        self.changing = f"{what} failed or was interrupted half-way"
        yield
        self.changing = None

    def slots_for(self, capacity: int, store: LayerStore) -> int:
        """Slots that a retrieval layer needs for `capacity` tokens as `capacity` counts them."""
        slots = capacity + int((self.rows.prompt - self.left_out[store.lengths]).max(initial=0))
        return slots if self.max_len is None else min(slots, self.max_len)

    def slots_held(self, store: LayerStore) -> int:
        """Slots of a retrieval layer that hold tokens of the row with most of them; an upper bound."""
        return int((self.rows.held - self.left_out[store.lengths]).max(initial=0))

    def lengths_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The rows of `seq_lens`."""
        if device not in self.seq_lens:
            self._copy_to(device)
        return self.seq_lens[device].unbind(0)

    @in_normal_mode
    def _copy_to(self, device: torch.device) -> None:
        shape = (self.num_lengths, self.batch)
        known = next(iter(self.seq_lens.values()), None)
        self.seq_lens[device] = torch.zeros(shape, dtype=torch.int32, device=device) if known is None else known.to(device)

    @in_normal_mode
    def workspace(self, device: torch.device) -> Tensor:
        """Scratch of the ops, enough for every geometry."""
        if device not in self.workspaces:
            self.workspaces[device] = ops.new_workspace(device)
        return self.workspaces[device]

    @in_normal_mode
    def read_step(self, visible: Tensor) -> Tensor:
        """Padding of a step of one column, from `visible` [batch]: one launch, to an address that a captured step reads."""
        pad = self.step_pad
        if pad is None or (pad.shape, pad.device) != (visible.shape, visible.device):
            pad = self.step_pad = torch.empty(visible.shape, dtype=torch.int32, device=visible.device)
        return torch.eq(visible, 0, out=pad)

    @in_normal_mode
    def remove(self, rows: Rows) -> None:
        """Takes back on host and devices what `rows`, cut from the present ones, lack; the layers have been asked."""
        removed = self.tokens.take_back(self.rows.ends, rows.ends)
        for device, lengths in self.seq_lens.items():
            lengths.sub_(removed.to(device) if removed is not None else self.columns - rows.columns)
        gone = self.columns - rows.columns if removed is None else removed
        self.observed = {layer: each.without(gone) for layer, each in self.observed.items()}
        self.rows, self.prompt_end = rows, min(self.prompt_end, rows.columns)

    @in_normal_mode
    def select_rows(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was; as many rows as before, and lengths where they are."""
        chosen = self.with_rows(index)
        for device, lengths in self.seq_lens.items():
            lengths.copy_(chosen["seq_lens"][device])
        vars(self).update(chosen, seq_lens=self.seq_lens, addresses=self.addresses)

    def take(self, chosen: dict) -> None:
        """Holds what `with_rows` has made."""
        vars(self).update(chosen)

    @in_normal_mode
    def with_rows(self, index: Tensor) -> dict:
        """What is known of other rows, of which row i is what row index[i] is, by attribute."""
        tokens = copy.copy(self.tokens)
        tokens.select_rows(index)
        known = not index.is_cuda or self.rows.ragged or (self.left_out != self.left_out[:, :1]).any()
        host = index.cpu().numpy() if known else None  # else this would wait for the GPU
        rows = self.rows.select(host, len(index))
        tokens.cut(rows.columns)  # where the longest row goes
        return {
            "seq_lens": {device: lengths.index_select(1, index.to(device)) for device, lengths in self.seq_lens.items()},
            "tokens": tokens,
            "observed": {layer: each.select_rows(index) for layer, each in self.observed.items()},
            "rows": rows,
            "prompt_end": min(self.prompt_end, rows.columns),
            "left_out": self.left_out[:, np.zeros(len(index), dtype=np.int64) if host is None else host],
            "batch": len(index),
            "addresses": Addresses(),
        }


def check_lengths(max_len, rollback) -> tuple[int | None, int]:
    """`max_len` and `rollback` of a cache, checked. Raises TypeError or ValueError."""
    if max_len is not None and not 1 <= (max_len := token_count("max_len", max_len)) <= MAX_TOKENS:
        raise ValueError(f"max_len must be at least 1 token and at most 2^30, or None for a cache that grows; got {max_len}")
    if not 0 <= (rollback := token_count("rollback", rollback)) <= MAX_TOKENS:
        raise ValueError(f"rollback must be 0 to 2^30 tokens, got {rollback}")
    return max_len, rollback
