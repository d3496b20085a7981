"""ZigzagAttention: one layer's attention and cache as a module, for models that are not Hugging Face models."""

import torch
from torch import Tensor, nn

from ..planning.kv_format import parse_kv_format
from ..planning.plan import token_count
from . import ops, reference
from .chunk import Chunk
from .store import GROWTH_STEP, MAX_TOKENS, LayerStore, attend

_KINDS = ("retrieval", "streaming")


class ZigzagAttention(nn.Module):
    """Causal attention of new tokens over a cache that the module owns. Projections, RoPE and norms stay outside.

    Args:
        num_q_heads, num_kv_heads: local heads; num_q_heads is 1 to 16 times num_kv_heads.
        head_dim: 64, 80, 96, 128, 192, 256 or 512.
        kind: "retrieval" keeps every token; "streaming" keeps the first `sink` and the last `window` tokens.
        sink, window: tokens, of a streaming layer; ignored by a retrieval layer, so that one plan can be passed to all layers.
        max_len: most tokens per row of a retrieval layer, up to 2^30; ignored by a streaming layer, which has no limit.
        max_batch: rows of the buffers; a forward may use fewer and then takes the first ones.
        dtype: float16 or bfloat16, or float32 on the CPU. Default: torch's default dtype.
        scale: factor on q . k before the softmax; default head_dim ** -0.5.
        kv_format: of keys and values: "none", "fp8", "int8", "int4", or two as in "int8/int4".
        grow: a retrieval layer has addresses for `max_len` tokens from the start and gets memory as tokens come. Not for
            compiled or captured code, which could not ask for it.

    `k_cache` and `v_cache` are [max_batch, num_kv_heads, slots, head_dim], codes if quantised, with their scales in `store`;
    seq_lens [max_batch] int32, tokens held per row; workspace. None of them is in the state dict, all keep their addresses, so a
    step can be compiled with `fullgraph=True` or captured.

    Example:
        >>> layer = ZigzagAttention(32, 8, 128, kind="streaming", sink=64, window=256)
        >>> out = layer(q, k, v)  # q [1, 32, new, 128], k and v [1, 8, new, 128], after RoPE; prompt or single token alike

    Raises TypeError or ValueError for options outside these limits. Inference only. Source: ZigzagAttention (https://arxiv.org/abs/2508.12407).
    """

    def __init__(
        self,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        kind: str,
        sink: int = 0,
        window: int = 0,
        max_len: int | None = None,
        max_batch: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        scale: float | None = None,
        kv_format="none",
        grow: bool = False,
    ):
        super().__init__()
        sink, window = token_count("sink", sink), token_count("window", window)
        max_len = None if max_len is None else token_count("max_len", max_len)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in ops.DTYPES:
            raise ValueError(f"dtype must be float16 or bfloat16, or float32 on the CPU; got {dtype}")
        _check_geometry(num_q_heads, num_kv_heads, head_dim, max_batch, torch.get_default_device() if device is None else device)
        _check_kind(kind, sink, window, max_len)
        self.kind, self.max_len = kind, max_len if kind == "retrieval" else None
        self.sink, self.window = (sink, window) if kind == "streaming" else (0, 0)
        self.num_q_heads = num_q_heads
        self.scale = head_dim**-0.5 if scale is None else float(scale)
        self.grow = bool(grow) and kind == "retrieval"
        self.store = LayerStore(self.sink, self.window, kv_format=parse_kv_format("kv_format", kv_format))
        like = torch.empty(max_batch, num_kv_heads, 0, head_dim, dtype=dtype, device=device)
        self.store.allocate(like, 0 if self.grow else self.max_len or 0, self.max_len, grows=self.grow)
        self.register_buffer("seq_lens", torch.zeros(max_batch, dtype=torch.int32, device=like.device), persistent=False)
        workspace = ops.new_workspace(like.device)
        self.register_buffer("workspace", workspace, persistent=False)
        self._longest = 0  # tokens of the longest row, an upper bound, and whether all rows hold as many: of eager forwards
        self._uniform = True
        self._counts = True  # False once a forward has been compiled or captured, which the host cannot count
        self._open: int | None = None  # columns that a call which is not over may have written; None: there is no such call

    @property
    def k_cache(self) -> Tensor:
        return self.store.keys

    @property
    def v_cache(self) -> Tensor:
        return self.store.values

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None
    ) -> Tensor:
        """Attends, appends, and advances `seq_lens`, all on the device and without waiting for it.

        Args:
            q: [batch, num_q_heads, q_len, head_dim]; k, v: [batch, num_kv_heads, q_len, head_dim]; batch <= max_batch.
            pad: [batch] int32, leading columns of this chunk that are padding; their output is 0. Clamped to 0 ... q_len.
            cos, sin: [batch or 1, q_len, rotary_dim], tables of RoPE; q and k are then given without it, see `ops.attention`.

        Returns:
            [batch, num_q_heads, q_len, head_dim] in the dtype of q.

        Raises:
            RuntimeError: a retrieval layer would exceed `max_len`, before anything is written. Compiled or captured code cannot
                make this check: there, tokens past `max_len` are neither kept nor seen by later ones. Call `check_room` between
                steps, or keep count. An eager forward after a compiled or captured one reads `seq_lens` and so waits for the
                device. Shapes and dtypes are checked by the op in all cases.
            RuntimeError: "call reset()", where an interrupt (Ctrl-C) came between the append of several tokens to a full ring and
                the end of their forward. After any other interrupt of eager code the layer is as before that call or behind it.
        """
        batch, q_len = q.shape[0], q.shape[2]
        pad = None if pad is None else pad.clamp(0, q_len)
        new = q_len if pad is None else q_len - pad
        if cos is not None and q_len > ops.MAX_DECODE_QUERIES:
            q, k = reference.rotate(q, cos, sin), reference.rotate(k, cos, sin)
            cos = sin = None
        seq_lens = self.seq_lens if batch == self.seq_lens.shape[0] else self.seq_lens[:batch]
        chunk = Chunk((seq_lens,), pad, self.workspace, cos=cos, sin=sin)
        if ops.is_captured(q):
            if self.grow:
                raise RuntimeError("a layer with grow=True cannot be compiled or captured: make it with grow=False")
            if self._open is not None:
                raise RuntimeError(
                    "an earlier call was interrupted: call check_room() or reset() before compiled or captured code"
                )
            self._counts = self._uniform = False
            out = attend((self.store,), q, k, v, self.scale, chunk)
            seq_lens.add_(new)
            return out
        self._close()
        longest = self._longest_after(q_len, pad, batch)
        uniform = self._uniform and pad is None and batch == self.seq_lens.shape[0]
        self.store.grow(min(-(-longest // GROWTH_STEP) * GROWTH_STEP, self.max_len or 0))
        self._open = q_len
        try:
            out = attend((self.store,), q, k, v, self.scale, chunk._replace(past=self._longest if uniform else None))
        except Exception:  # nothing was written; an interrupt may come behind the append
            self._open = None
            raise
        seq_lens.add_(new)
        self._longest, self._uniform = longest, uniform
        self._open = None
        return out

    def check_room(self, tokens: int = 1) -> None:
        """Raises RuntimeError unless every row has room for `tokens` more. Reads `seq_lens`, so it waits for the device."""
        self._close()
        self._longest = int(self.seq_lens.max())
        self._longest_after(tokens, None, self.seq_lens.shape[0])

    def reset(self) -> None:
        """Empties the cache; the buffers stay where they are."""
        self._open = self._open or 0
        self.seq_lens.zero_()
        self._longest, self._uniform = 0, self._counts
        self.store.release()
        self._open = None

    def _close(self) -> None:
        """After an interrupt `seq_lens` has the last word. Raises RuntimeError if a ring may lack tokens that these count."""
        if self._open is None:
            return
        lengths = self.seq_lens.tolist()
        if self.window and self._open > 1 and not self.store.is_whole(max(lengths), self._open):  # one overwrites what none sees
            raise RuntimeError(
                f"a forward of {self._open} tokens was interrupted and may have overwritten older ones in the ring: call reset()"
            )
        self._longest, self._uniform = max(lengths), self._uniform and len({*lengths}) == 1
        self._open = None

    def extra_repr(self) -> str:
        limits = f"max_len={self.max_len}" if self.kind == "retrieval" else f"sink={self.sink}, window={self.window}"
        return f"{self.kind}, {limits}, cache={tuple(self.k_cache.shape)}"

    def _apply(self, fn, recurse: bool = True):
        """`.to(...)`: what is held moves; the size of the workspace depends on the device, so that it is made anew."""
        before = self.workspace.device
        super()._apply(fn, recurse)
        device, (max_batch, num_kv_heads, head_dim) = self.workspace.device, self.store.geometry
        if device != before:
            self.workspace = ops.new_workspace(device)
        self.store.move(fn(torch.empty(max_batch, num_kv_heads, 0, head_dim, dtype=self.store.dtype, device=before)))
        return self

    def _longest_after(self, tokens: int, pad: Tensor | None, batch: int) -> int:
        """Tokens of the longest row, or an upper bound, after `tokens` more columns. Raises RuntimeError if they do not fit."""
        longest = self._longest + tokens
        if self.max_len is None or (self._counts and longest <= self.max_len):
            return longest
        # The bound takes padding for tokens, so the device has the last word.
        held = self.seq_lens[:batch]
        longest = int((held + tokens if pad is None else held + (tokens - pad)).max())
        if longest > self.max_len:
            raise RuntimeError(
                f"the cache is full: max_len is {self.max_len} tokens, {int(held.max())} are held and {tokens} more were given; "
                "nothing was written"
            )
        return max(longest, int(self.seq_lens.max()))


def _check_geometry(num_q_heads: int, num_kv_heads: int, head_dim: int, max_batch: int, device) -> None:
    if head_dim not in ops.HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {', '.join(map(str, ops.HEAD_DIMS))}; got {head_dim}")
    if num_kv_heads < 1 or num_q_heads % num_kv_heads or not 1 <= num_q_heads // num_kv_heads <= ops.MAX_GROUP_SIZE:
        raise ValueError(
            f"num_q_heads must be 1 to {ops.MAX_GROUP_SIZE} times num_kv_heads; got {num_q_heads} and {num_kv_heads}"
        )
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, got {max_batch}")


def _check_kind(kind: str, sink: int, window: int, max_len: int | None) -> None:
    if kind not in _KINDS:
        raise ValueError(f"kind must be 'retrieval' or 'streaming', got {kind!r}")
    if kind == "retrieval" and (max_len is None or not 1 <= max_len <= MAX_TOKENS):
        raise ValueError(f"a retrieval layer needs max_len >= 1 tokens, got {max_len}; at most 2^30")
    if kind == "streaming" and (sink < 0 or window < 1):
        raise ValueError(f"a streaming layer needs sink >= 0 and window >= 1 tokens, got sink {sink} and window {window}")
