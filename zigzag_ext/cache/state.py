"""What all layers of a ZigzagCache share: how many tokens each row holds, scratch, and what was compiled on the buffers."""

import functools
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..attention import ops


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
        self.given: set[int] = set()  # layers whose new keys this cache was given in the forward pass under way
        self.attended: set[int] = set()  # those that it has written
        self.num_forwards = 0
        self.start(None)

    def start(self, batch: int | None) -> None:
        self.batch = batch
        self.seq_lens: dict[torch.device, Tensor] = {}  # [batch] int32; one copy per device that holds layers
        self.pad: dict[torch.device, Tensor] = {}  # [batch] int32, of this chunk; empty without padding
        self.step_pad: Tensor | None = None  # [batch] int32, of steps of one column
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

    def check_chunk(self, index: int, k: Tensor) -> None:
        """Raises unless layer `index` may attend new keys k [batch, num_kv_heads, q_len, head_dim] in the forward under way."""
        if k.shape[0] != self.batch or k.shape[2] != self.q_len:
            raise ValueError(
                f"layer {index} was given keys of {k.shape[0]} rows x {k.shape[2]} tokens in a forward of "
                f"{self.batch} rows x {self.q_len} tokens"
            )
        if index in self.attended:
            raise RuntimeError(f"layer {index} attended twice in one forward: shared KV caches are not supported")

    def lengths_on(self, device: torch.device) -> Tensor:
        if device not in self.seq_lens:
            self._copy_to(device)
        return self.seq_lens[device]

    def pad_on(self, device: torch.device) -> Tensor | None:
        if self.pad and device not in self.pad:
            with torch.inference_mode(False):
                self.pad[device] = next(iter(self.pad.values())).to(device)
        return self.pad.get(device)

    @in_normal_mode
    def _copy_to(self, device: torch.device) -> None:
        known = next(iter(self.seq_lens.values()), None)
        self.seq_lens[device] = torch.zeros(self.batch, dtype=torch.int32, device=device) if known is None else known.to(device)

    def read_mask(self, mask: Tensor, q_len: int) -> tuple[Tensor | None, int]:
        """Padding columns of this chunk per row, or None if there are none, and the tokens of the longest row after it."""
        if mask.dim() != 2 or tuple(mask.shape) != (self.batch, self.columns + q_len):
            raise ValueError(
                f"attention_mask must be [batch, tokens seen + new tokens] = [{self.batch}, {self.columns + q_len}] of zeros "
                f"(left padding), then ones; got {tuple(mask.shape)}{self._used()}"
            )
        if q_len == 1:
            self.uniform = False  # until the next prompt's mask is read: looking at this one would wait for the device
            return self._read_step(mask[:, -1]), self.longest + 1
        return self._read_prompt(mask, q_len)

    def check_positions(self, positions: Tensor, q_len: int) -> None:
        """Raises ValueError if new tokens are said to stand among those held: a caller without a mask passes them once more.

        positions: [..., batch or 1, q_len]. Those of a single token are looked at on a CPU only: elsewhere that would wait.
        """
        if positions.shape[-1] != q_len:
            raise ValueError(
                f"position_ids must be [batch, {q_len}], one per new token; got {tuple(positions.shape)}{self._used()}"
            )
        if self.columns and (q_len > 1 or positions.device.type == "cpu"):
            held = self.lengths_on(positions.device)
            if (positions[..., 0] < held).any():
                first = positions[..., 0].min().item()
                raise ValueError(f"position_ids start at {first}, among the tokens that are held{self._used()}")

    def _used(self) -> str:
        """The end of a message about arguments that do not go on where the cache stopped."""
        if not self.columns:
            return ""
        return (
            f". The cache already holds {self.columns} tokens; pass the whole conversation, or reset() "
            "(prefill_chunk_size needs an empty cache)"
        )

    def _read_step(self, visible: Tensor) -> Tensor:
        """One launch, to an address that stays: a captured step reads it there."""
        pad = self.step_pad
        if pad is None or (pad.shape, pad.device) != (visible.shape, visible.device):
            with torch.inference_mode(False):
                pad = self.step_pad = torch.empty(visible.shape, dtype=torch.int32, device=visible.device)
        return torch.eq(visible, 0, out=pad)

    @in_normal_mode
    def _read_prompt(self, mask: Tensor, q_len: int) -> tuple[Tensor | None, int]:
        mask = mask.bool()
        padding = (~mask).sum(1)
        held = self.lengths_on(mask.device)
        interior = (mask[:, :-1] & ~mask[:, 1:]).any()
        changed = (padding.clamp(max=self.columns) != self.columns - held).any()
        interior, changed, least, most = torch.stack([interior.long(), changed.long(), padding.min(), padding.max()]).tolist()
        if interior:
            raise ValueError("attention_mask has zeros after ones: only left padding is supported (padding_side='left')")
        if changed:
            raise ValueError("attention_mask masks other tokens than those the cache left out before: start from an empty cache")
        self.uniform = most == 0
        pad = (padding - self.columns).clamp(0, q_len).int() if most > self.columns else None
        return pad, max(0, self.columns + q_len - least)

    def workspace(self, num_q_heads: int, num_kv_heads: int, head_dim: int, device: torch.device) -> Tensor:
        key = (num_q_heads, num_kv_heads, head_dim, device)
        if key not in self.workspaces:
            with torch.inference_mode(False):
                self.workspaces[key] = ops.new_workspace(self.batch, num_q_heads, num_kv_heads, head_dim, device)
        return self.workspaces[key]

    def set_batch(self, batch: int) -> None:
        """Goes on with another number of rows. A compiled step makes no scratch, so there is some for all geometries at once."""
        geometries, self.batch, self.workspaces = list(self.workspaces), batch, {}
        for geometry in geometries:
            self.workspace(*geometry)
        self.steps.clear()

    def advance(self, q_len: int) -> None:
        for device, lengths in self.seq_lens.items():
            lengths.add_(q_len)
            if self.pad:
                lengths.sub_(self.pad_on(device))
        self.columns += q_len
        self.longest = self.longest_after
