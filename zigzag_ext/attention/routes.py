"""Attention of a prompt chunk: our kernel or the best backend of torch, chosen by shape and by measurement.

A streaming layer always runs our kernel, which is linear in the chunk. A retrieval layer whose rows all hold the same known
number of tokens may run a backend: one call where the backend aligns its causal mask with the last key (flash, fa3), otherwise
the past (dense) and the chunk (causal) separately, merged by their log-sum-exp. No mask is built and no key or value is
repeated for grouped heads. Everything else runs our kernel: padded or ragged rows, graph capture, up to
`ops.MAX_DECODE_QUERIES` new tokens, and the CPU unless a backend is asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from ..planning import env
from . import ops
from .backends import BACKENDS, ranking, serves
from .ops import KvBuffers

ENVIRONMENT = "ZIGZAG_PREFILL_BACKEND"
CHOICES = ("auto", "zigzag", *BACKENDS)

# Below this many new tokens our kernel has too few blocks to read a long cache at full speed unless it splits the keys
# (ops.splits_prompts; 64 tokens x 32/8 heads are 16 blocks, an H100 has 132 multiprocessors); flash splits them. On an H100, 256
# tokens on 8K keys take 227 us by our kernel without splits and 128 by flash, 512 tokens 236 and 250. From here on the
# measurement decides.
# `python -m benchmarks.prefill --scenario short` compares the routes on both sides of the two limits.
SHORT_CHUNK = 512
LONG_CACHE = 512  # keys; on a shorter cache a short chunk takes our prefill kernel: one call instead of two
# Where neither a backend nor a kernel that splits the keys serves (padded or ragged rows, graph capture), up to this many tokens
# go through the decode kernel, 16 at a time: on an H100, 64 tokens take 117 instead of 341 us on 8K keys, 0.95 instead of 5.2 ms
# on 128K.
SLICED_CHUNK = 64
# cuDNN builds a plan per new shape, 40 to 70 ms on the host (https://github.com/flashinfer-ai/flashinfer/pull/5245,
# https://github.com/pytorch/pytorch/pull/191576), shared by the layers of a forward. Each layer must gain its share of that.
PLAN_FLOPS = 2e12  # about 3 ms on an H100
PLAN_LEAST_KEYS = (
    64  # such backends need not serve a handful of keys (cuDNN once refused a single one): those never go there alone
)
QUANTISED_BLOCK = 16384  # keys of a quantised past that are widened at a time: 32 MiB of each in 16 bits for 8 heads of 128
PLAN_KEYS = 65536  # the past goes to such a backend in blocks: its shapes repeat from chunk to chunk, a merge costs below 1 %


@dataclass(frozen=True)
class _Options:
    backend: str | None = None
    whole_chunk: bool = False


_DEFAULTS = _Options()
_options: ContextVar[_Options] = ContextVar("zigzag_prefill_options", default=_DEFAULTS)


@contextmanager
def prefill_options(backend: str | None = None, duo_attention: bool = False) -> Iterator[None]:
    """`with zz.prefill_options(...): model.generate(...)` changes how prompt chunks are computed, in this thread.

    Args:
        backend: of retrieval layers. "auto" measures once per device, dtype and head geometry; "zigzag" is our kernel; "cudnn",
            "flash" and "torch_cpu" are torch's; "fa3" is FlashAttention-3 (package `flash_attn_3` or `fa3-fwd`). None: the
            environment variable ZIGZAG_PREFILL_BACKEND, else "auto". Padded rows and up to `ops.MAX_DECODE_QUERIES` new tokens
            always take our kernels, and so do layers with heads of both kinds.
        duo_attention: streaming layers attend a chunk of two or more tokens as DuoAttention's code does: to all of the chunk
            that came before, and to the sink and window tokens cached before the chunk. So the first chunk is full attention,
            and results depend on how a prompt is cut. INEXACT, quadratic in the chunk, off by default: only for comparison
            with published accuracy. Decode steps keep this package's rule, whose window counts the new token.

    Raises:
        ValueError: unknown backend; or, in the forward, one that cannot serve the device, dtype or head_dim, by name.
        ImportError: in the forward, fa3 is not installed.

    Source of `duo_attention`: https://github.com/mit-han-lab/duo-attention (arXiv 2410.10819).
    """
    if backend is not None:
        _known(backend, "backend")
    token = _options.set(_Options(backend, bool(duo_attention)))
    try:
        yield
    finally:
        _options.reset(token)


def attend(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    caches: KvBuffers,
    seq_lens: Tensor,
    *,
    past: int | None,
    pad: Tensor | None = None,
    heads: Tensor | None = None,
    cache_rows: Tensor | None = None,
    row: int | None = None,
    out: Tensor | None = None,
    sink: int = 0,
    window: int = 0,
    scale: float | None = None,
    workspace: Tensor | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """`ops.attention` without its lse, through the chosen backend. Attends, then appends, in place.

    Args:
        past: tokens that every row holds before the call, if the host knows that they are equally many; None if it does not.
        row: what cache_rows has, if it is one number and the host knows it.
        others: as in `ops.attention`. A call with `heads`, `cache_rows` without `row`, `out`, `softcap` or `sink_logits` always
            takes our kernels.

    Returns:
        out [batch, num_q_heads, q_len, head_dim] in the dtype of q, memory order tokens before heads; or the given one.

    Raises:
        What `ops.attention` and `prefill_options` raise. ValueError, and nothing was written: a full cache has fewer than
        past + q_len slots; or `duo_attention` is asked for on a ring of more than sink + window slots.
    """
    q_len, slots = q.shape[2], caches.keys.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    whole_chunk = window > 0 and q_len > 1 and _options.get().whole_chunk
    if whole_chunk and slots > sink + window:
        raise ValueError(
            f"duo_attention attends whatever a ring holds: it needs one of sink + window = {sink + window} slots, got {slots}"
        )
    if past is not None and pad is None and not window and slots and past + q_len > slots:
        raise ValueError(f"a full cache of {slots} slots cannot take {q_len} tokens after {past}; nothing was written")
    name = "zigzag"
    simple = past is not None and not softcap and all(t is None for t in (pad, heads, out, sink_logits))
    simple = simple and (cache_rows is None or row is not None)
    if q_len > ops.MAX_DECODE_QUERIES and (whole_chunk or not window) and simple and not ops.is_captured(q):
        name = choose(q, k_new, min(past, slots), caches.is_quantised) if _is_regular(q, k_new, v_new) else name
    if name != "zigzag":
        if cache_rows is not None:
            caches, seq_lens = caches.map(lambda t: t[row : row + 1]), seq_lens[row : row + 1]
        return _attend_by(BACKENDS[name], q, k_new, v_new, caches, seq_lens, min(past, slots), sink, window, scale)
    options = {"pad": pad, "heads": heads, "cache_rows": cache_rows, "out": out, "scale": scale, "workspace": workspace}
    new, options = (q, k_new, v_new), options | {"softcap": softcap, "sink_logits": sink_logits} | caches.scales
    if whole_chunk:
        # A ring is a full cache in another order. What this call appends to free slots is where the ring wants it.
        out, _ = ops.attention(*new, *caches[:2], seq_lens.clamp(max=slots), **options)
        own = new[1:] if heads is None else (t.index_select(1, heads) for t in new[1:])
        ops.append(*own, *caches[:2], seq_lens, pad=pad, cache_rows=cache_rows, sink=sink, window=window, **caches.scales)
        return out
    # The op itself slices over a quantised cache.
    few = ops.MAX_DECODE_QUERIES < q_len <= SLICED_CHUNK and slots >= LONG_CACHE and not caches.is_quantised
    few = few and not window and heads is None and cache_rows is None and out is None
    if q.is_cuda and few and _is_regular(*new) and not ops.splits_prompts(q.device, q.shape[3]):
        softmax = {"scale": scale, "softcap": softcap, "sink_logits": sink_logits}
        return attend_in_slices(*new, caches, seq_lens, pad=pad, workspace=workspace, **softmax)
    return ops.attention(*new, *caches[:2], seq_lens, sink=sink, window=window, **options)[0]


def attend_in_slices(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    caches: KvBuffers,
    seq_lens: Tensor,
    *,
    pad: Tensor | None = None,
    workspace: Tensor | None = None,
    **softmax,
) -> Tensor:
    """`attend` over a full cache by the decode kernel, `ops.MAX_DECODE_QUERIES` tokens a call."""
    q_len, (out, _) = q.shape[2], ops.new_output(q)
    options = {"workspace": workspace, **softmax, **caches.scales}
    for start in range(0, q_len, ops.MAX_DECODE_QUERIES):
        piece = slice(start, min(start + ops.MAX_DECODE_QUERIES, q_len))
        held, skipped = seq_lens + start, None
        if pad is not None:
            held = seq_lens + (start - pad).clamp(min=0)
            skipped = pad - start
        new = (t[:, :, piece] for t in (q, k_new, v_new))
        ops.attention(*new, *caches[:2], held, pad=skipped, out=out[:, :, piece], **options)
    return out


def _attend_by(backend, q, k_new, v_new, caches: KvBuffers, seq_lens, held: int, sink: int, window: int, scale: float) -> Tensor:
    """`attend` by a backend, of rows that all hold `held` tokens."""
    ops.refuse_autograd(q, k_new, v_new)

    def append():
        ops.append(k_new, v_new, *caches[:2], seq_lens, sink=sink, window=window, **caches.scales)

    stored = Stored.of(caches, q.dtype)
    if caches.is_quantised:
        # New tokens are attended as their codes: appended first, and read back like the past.
        append()
        out = _attend_parts(backend, q, stored, held, stored.read(held, held + q.shape[2]), scale)
    elif not window and held and backend.bottom_right:
        append()
        out = backend.call(q, *stored.read(0, held + q.shape[2]), True, scale)[0]
    else:
        out = _attend_parts(backend, q, stored, held, (k_new, v_new), scale)
        append()
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def choose(q: Tensor, k_new: Tensor, past: int, quantised: bool = False) -> str:
    """Name of the implementation that computes q [batch, num_q_heads, q_len, head_dim] over `past` keys and the chunk."""
    wanted = _options.get().backend or env.read(ENVIRONMENT) or "auto"
    batch, num_q_heads, q_len, head_dim = q.shape
    if q_len <= ops.MAX_DECODE_QUERIES or wanted == "zigzag":
        return "zigzag"
    few = 0 < past < PLAN_LEAST_KEYS
    if wanted != "auto":
        BACKENDS[wanted].require(q, wanted)
        return "zigzag" if few and BACKENDS[wanted].plans else wanted
    if not q.is_cuda:
        return "zigzag"
    splits = ops.splits_prompts(q.device, head_dim)
    if quantised:  # kernels that do not split take 16 tokens a launch there, and re-read the cache for each
        return "flash" if not splits and serves("flash", q.device, q.dtype, head_dim) else "zigzag"
    if q_len < SHORT_CHUNK:
        if splits:
            return "zigzag"
        return "flash" if past + q_len >= LONG_CACHE and serves("flash", q.device, q.dtype, head_dim) else "zigzag"
    flops = 4 * batch * num_q_heads * q_len * (past + q_len / 2) * head_dim
    names = ranking(q.device, q.dtype, num_q_heads, k_new.shape[1], head_dim)
    plans = flops >= PLAN_FLOPS and not few
    return next(name for name in names if name == "zigzag" or plans or not BACKENDS[name].plans)


@dataclass(frozen=True)
class Stored:
    """Keys and values of a full cache [batch, num_kv_heads, slots, head_dim], plain or as codes with scales (else None)."""

    caches: tuple[Tensor, Tensor]
    scales: tuple[Tensor | None, Tensor | None]
    dtype: torch.dtype

    @classmethod
    def of(cls, caches: KvBuffers, dtype: torch.dtype) -> "Stored":
        return cls(caches[:2], caches[2:], dtype)

    @property
    def is_quantised(self) -> bool:
        """Whether reading widens codes into scratch: at most QUANTISED_BLOCK tokens at a time."""
        return any(scale is not None for scale in self.scales)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return tuple(self._widen(c[:, :, start:stop], s, start, stop) for c, s in zip(self.caches, self.scales, strict=True))

    def _widen(self, codes: Tensor, scale: Tensor | None, start: int, stop: int) -> Tensor:
        if scale is None:
            return codes
        if codes.dtype == torch.uint8:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).to(torch.int8) - 8
        return (codes.float() * scale[:, :, start:stop, None]).to(self.dtype)


def _attend_parts(backend, q: Tensor, past: Stored, held: int, chunk: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Attention over the `held` first tokens of the past (dense) and the chunk (causal), merged."""
    out, lse = _in_token_order(backend.call(q, *chunk, True, scale))
    if past.is_quantised:
        ends = [*range(QUANTISED_BLOCK, held, QUANTISED_BLOCK)]
    else:
        ends = [*range(PLAN_KEYS, held - PLAN_LEAST_KEYS + 1, PLAN_KEYS)] if backend.plans else []
    ends += [held] if held else []
    for start, end in zip([0, *ends], ends, strict=False):
        keys, values = past.read(start, end)
        out, lse = ops.merge_states(out, lse, *_in_token_order(backend.call(q, keys, values, False, scale)))
    return out.transpose(1, 2)


def _in_token_order(state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """out [batch, q_len, num_q_heads, head_dim] and its lse: contiguous where the backend wrote tokens before heads."""
    return tuple(t.transpose(1, 2) for t in state)


def _is_regular(q: Tensor, k_new: Tensor, v_new: Tensor) -> bool:
    """Whether backends can read the tensors as they are. What is wrong rather than unusual is named by our op's checks."""
    batch, num_q_heads, q_len, head_dim = q.shape
    like = k_new.shape == v_new.shape == (batch, k_new.shape[1], q_len, head_dim) and q.dtype == k_new.dtype == v_new.dtype
    group, rest = divmod(num_q_heads, k_new.shape[1])
    if not like or rest or group > ops.MAX_GROUP_SIZE or head_dim not in ops.HEAD_DIMS or not q.numel():
        return False
    return all(t.stride(3) == 1 and _is_aligned(t) for t in (q, k_new, v_new))


def _is_aligned(t: Tensor) -> bool:
    """Whether every row of head_dim elements starts at a multiple of 16 bytes."""
    return t.data_ptr() % 16 == 0 and not any(t.stride(i) * t.itemsize % 16 for i in range(3) if t.shape[i] > 1)


def _known(name: str, origin: str) -> None:
    if name not in CHOICES:
        raise ValueError(f"unknown prefill {origin} '{name}'; known: {', '.join(CHOICES)}")
