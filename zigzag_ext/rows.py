"""What all layers of a ZigzagCache share: how many tokens each row holds, scratch, and what was compiled on the buffers."""

import functools
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import ops


def in_normal_mode(function):
    """Tensors made under `torch.inference_mode` cannot be written outside it; a cache outlives the mode it was made in."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return wrapper


class Steps(WeakKeyDictionary):
    """What was compiled on the present addresses, by whom; a copy of a cache has other addresses."""

    def __deepcopy__(self, memo) -> "Steps":
        return Steps()


class Rows:
    """What all layers share: how many tokens each row holds, on the device, with a host mirror that never waits for it."""

    def __init__(self, max_len: int | None, stores: bool):
        self.max_len, self.stores = max_len, stores
        self.attended: set[int] = set()  # layers that the forward pass under way has written
        self.num_forwards = 0
        self.start(None)

    def start(self, batch: int | None) -> None:
        self.batch = batch
        self.seq_lens: dict[torch.device, Tensor] = {}  # [batch] int32; one copy per device that holds layers
        self.pad: dict[torch.device, Tensor] = {}  # [batch] int32, of this chunk; empty without padding
        self.workspaces: dict[tuple, Tensor] = {}
        self.steps = Steps()
        self.forget()

    def forget(self) -> None:
        self.capacity = 0  # tokens for which the retrieval layers have memory
        self.columns = 0  # tokens seen per row, padding included
        self.longest = self.longest_after = 0  # tokens held by the longest row, an upper bound: now, after this forward
        self.q_len = 0  # columns of the forward pass under way, 0 outside one
        self.uniform = True  # whether every row is known to hold `columns` tokens
        self.broken = False
        for lengths in self.seq_lens.values():
            lengths.zero_()

    def lengths_on(self, device: torch.device) -> Tensor:
        if device not in self.seq_lens:
            self._copy_to(device)
        return self.seq_lens[device]

    def pad_on(self, device: torch.device) -> Tensor | None:
        if self.pad and device not in self.pad:
            self.pad[device] = next(iter(self.pad.values())).to(device)
        return self.pad.get(device)

    @in_normal_mode
    def _copy_to(self, device: torch.device) -> None:
        known = next(iter(self.seq_lens.values()), None)
        self.seq_lens[device] = torch.zeros(self.batch, dtype=torch.int32, device=device) if known is None else known.to(device)

    def workspace(self, num_q_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> Tensor:
        key = (num_q_heads, num_kv_heads, head_dim, device)
        if key not in self.workspaces:
            with torch.inference_mode(False):
                self.workspaces[key] = ops.new_workspace(self.batch, num_q_heads, num_kv_heads, head_dim, device)
        return self.workspaces[key]

    def advance(self, q_len: int) -> None:
        for device, lengths in self.seq_lens.items():
            lengths.add_(q_len)
            if self.pad:
                lengths.sub_(self.pad_on(device))
        self.columns += q_len
        self.longest = self.longest_after
