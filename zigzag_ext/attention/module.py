"""ZigzagAttention: one layer's attention and cache as a module, for models that are not Hugging Face models."""

import torch
from torch import Tensor, nn

from ..planning.plan import token_count
from . import ops

_KINDS = ("retrieval", "streaming")


class ZigzagAttention(nn.Module):
    """Causal attention of new tokens over a cache that the module owns. Projections, RoPE and norms stay outside.

    Args:
        num_q_heads, num_kv_heads: local heads; num_q_heads is 1 to 16 times num_kv_heads.
        head_dim: 64, 80, 96, 128 or 256.
        kind: "retrieval" keeps every token; "streaming" keeps the first `sink` and the last `window` tokens.
        sink, window: tokens, of a streaming layer; ignored by a retrieval layer, so that one plan can be passed to all layers.
        max_len: most tokens per row of a retrieval layer; ignored by a streaming layer, which has no limit.
        max_batch: rows of the buffers; a forward may use fewer and then takes the first ones.
        dtype: float16 or bfloat16, or float32 on the CPU. Default: torch's default dtype.
        scale: factor on q . k before the softmax; default head_dim ** -0.5.

    Buffers, none of them in the state dict: k_cache and v_cache [max_batch, num_kv_heads, slots, head_dim]; seq_lens [max_batch]
    int32, tokens held per row; workspace. All keep their addresses, so a step can be compiled with `fullgraph=True` or captured.

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
    ):
        super().__init__()
        sink, window = token_count("sink", sink), token_count("window", window)
        max_len = None if max_len is None else token_count("max_len", max_len)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in ops.DTYPES:
            raise ValueError(f"dtype must be float16 or bfloat16, or float32 on the CPU; got {dtype}")
        _check_geometry(num_q_heads, num_kv_heads, head_dim, max_batch)
        _check_kind(kind, sink, window, max_len)
        self.kind, self.max_len = kind, max_len if kind == "retrieval" else None
        self.sink, self.window = (sink, window) if kind == "streaming" else (0, 0)
        self.num_q_heads = num_q_heads
        self.scale = head_dim**-0.5 if scale is None else float(scale)
        shape = (max_batch, num_kv_heads, self.max_len or sink + window, head_dim)
        seq_lens = torch.zeros(max_batch, dtype=torch.int32, device=device)
        workspace = ops.new_workspace(max_batch, num_q_heads, num_kv_heads, head_dim, seq_lens.device)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("seq_lens", seq_lens, persistent=False)
        self.register_buffer("workspace", workspace, persistent=False)
        self._longest = 0  # tokens of the longest row, counted on the host by eager forwards only

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pad: Tensor | None = None) -> Tensor:
        """Attends, appends, and advances `seq_lens`, all on the device and without waiting for it.

        Args:
            q: [batch, num_q_heads, q_len, head_dim]; k, v: [batch, num_kv_heads, q_len, head_dim]; batch <= max_batch.
            pad: [batch] int32, leading columns of this chunk that are padding; their output is 0. Clamped to 0 ... q_len.

        Returns:
            [batch, num_q_heads, q_len, head_dim] in the dtype of q.

        Raises:
            RuntimeError: a retrieval layer would exceed `max_len`, before anything is written. Compiled or captured code cannot
                make this check: there, tokens past `max_len` are neither kept nor seen by later ones. Call `check_room` between
                steps, or keep count. Shapes and dtypes are checked by the op in both cases.
        """
        batch, q_len = q.shape[0], q.shape[2]
        pad = None if pad is None else pad.clamp(0, q_len)
        counts = not (torch.compiler.is_compiling() or (q.is_cuda and torch.cuda.is_current_stream_capturing()))
        longest = self._longest_after(q_len, pad, batch) if counts else 0
        rows = [t if batch == t.shape[0] else t[:batch] for t in (self.k_cache, self.v_cache, self.seq_lens)]
        out, _ = ops.attention(
            q, k, v, *rows, pad=pad, sink=self.sink, window=self.window, scale=self.scale, workspace=self.workspace
        )
        rows[2].add_(q_len if pad is None else q_len - pad)
        if counts:
            self._longest = longest
        return out

    def check_room(self, tokens: int = 1) -> None:
        """Raises RuntimeError unless every row has room for `tokens` more. Reads `seq_lens`, so it waits for the device."""
        self._longest = int(self.seq_lens.max())
        self._longest_after(tokens, None, self.seq_lens.shape[0])

    def reset(self) -> None:
        """Empties the cache; the buffers stay where they are."""
        self.seq_lens.zero_()
        self._longest = 0

    def extra_repr(self) -> str:
        limits = f"max_len={self.max_len}" if self.kind == "retrieval" else f"sink={self.sink}, window={self.window}"
        return f"{self.kind}, {limits}, cache={tuple(self.k_cache.shape)}"

    def _apply(self, fn, recurse: bool = True):
        """`.to(device)`: the size of the workspace depends on the device, so that it is made anew rather than moved."""
        before = self.workspace.device
        super()._apply(fn, recurse)
        device = self.workspace.device
        if device != before:
            max_batch, num_kv_heads, _, head_dim = self.k_cache.shape
            self.workspace = ops.new_workspace(max_batch, self.num_q_heads, num_kv_heads, head_dim, device)
        return self

    def _longest_after(self, tokens: int, pad: Tensor | None, batch: int) -> int:
        """Tokens of the longest row, or an upper bound, after `tokens` more columns. Raises RuntimeError if they do not fit."""
        longest = self._longest + tokens
        if self.max_len is None or longest <= self.max_len:
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


def _check_geometry(num_q_heads: int, num_kv_heads: int, head_dim: int, max_batch: int) -> None:
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
    if kind == "retrieval" and (max_len is None or max_len < 1):
        raise ValueError(f"a retrieval layer needs max_len >= 1 tokens, got {max_len}")
    if kind == "streaming" and (sink < 0 or window < 1):
        raise ValueError(f"a streaming layer needs sink >= 0 and window >= 1 tokens, got sink {sink} and window {window}")
