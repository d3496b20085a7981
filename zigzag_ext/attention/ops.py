"""The compiled ops as documented Python functions, and their fake kernels for `torch.compile`.

What each op computes is written down in `reference.py`. All ops run on the current CUDA stream or on torch's CPU threads, never
wait for the GPU, and can be captured in a CUDA graph: lengths are read on the device, so one captured graph serves every length.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C, _ops  # noqa: F401  (importing _ops registers torch.ops.zigzag)

HEAD_DIMS: tuple[int, ...] = tuple(_C.HEAD_DIMS)
DTYPES: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)  # float32 on the CPU only
MAX_GROUP_SIZE: int = _C.MAX_GROUP_SIZE
MAX_DECODE_QUERIES: int = _C.MAX_DECODE_QUERIES

# Formats of a key or value cache and the dtype of its codes; csrc/kv/format_*.h have the byte layouts. uint8: two codes a byte.
KV_FORMATS: dict[str, torch.dtype | None] = {
    name: getattr(torch, entry["code_dtype"]) if entry["bits"] else None for name, entry in _C.formats().items()
}


def new_workspace(device: torch.device | str) -> Tensor:
    """Scratch for `attention` on `device`: [about 10 MB] uint8 zeros, enough for any shape; empty on the CPU.

    Make one per cache and reuse it for all its layers and steps. Two streams must not share one at the same time.
    """
    return torch.zeros(0 if torch.device(device).type == "cpu" else _C.WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@torch.compiler.assume_constant_result
def splits_prompts(device: torch.device, head_dim: int) -> bool:
    """Whether `attention` on `device` shares the keys of a prompt's chunk out over the GPU, in plain and quantised full caches.

    Its prefill kernel for sm_90a does, and reads codes as they are. Where there is none, few new tokens leave most of a GPU idle,
    and over a quantised cache they are attended 16 at a time.
    """
    if device.type != "cuda" or "90a" not in _C.build_info()["cuda_archs"].split(";"):
        return False
    major, minor = torch.cuda.get_device_capability(device)
    # Heads, tokens and slots do not decide.
    return _C.prefill_plan(10 * major + minor, 1, 1, 1, head_dim, MAX_DECODE_QUERIES + 1, 1)["kernel"] == "pipeline"


def new_cache(
    batch: int,
    num_kv_heads: int,
    slots: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    kv_format: str = "none",
) -> tuple[Tensor, Tensor | None]:
    """Uninitialised memory for the keys or the values of one layer, and the scales of a quantised format (else None).

    kv_format: "none" (elements of `dtype`), "fp8", "int8" or "int4". A slot is never read before it is written.
    """
    shape = (batch, num_kv_heads, slots)
    width, code = cache_row(head_dim, dtype, kv_format)
    cache = torch.empty(*shape, width, dtype=code, device=device)
    return cache, None if kv_format == "none" else torch.empty(shape, dtype=torch.float32, device=device)


def cache_row(head_dim: int, dtype: torch.dtype, kv_format: str) -> tuple[int, torch.dtype]:
    """Last size and dtype of a cache tensor of `kv_format`. Raises ValueError on an unknown format."""
    if kv_format not in KV_FORMATS:
        raise ValueError(f"KV format {kv_format!r} is not supported; supported: {', '.join(KV_FORMATS)}")
    bits = _C.formats()[kv_format]["bits"]
    return head_dim * bits // 8 if bits else head_dim, KV_FORMATS[kv_format] or dtype


class KvBuffers(NamedTuple):
    """The caches of one layer as one value: `attention` and `append` take its fields as k_cache, v_cache, k_scale and v_scale."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "KvBuffers":
        """Of each of the tensors."""
        return KvBuffers(*(None if t is None else function(t) for t in self))

    @property
    def is_quantised(self) -> bool:
        return self.key_scales is not None or self.value_scales is not None

    @property
    def scales(self) -> dict[str, Tensor | None]:
        """The scales under the names that the ops give them."""
        return {"k_scale": self.key_scales, "v_scale": self.value_scales}


def attention(
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    pad: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    heads: Tensor | None = None,
    cache_rows: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    sink: int = 0,
    window: int = 0,
    scale: float | None = None,
    workspace: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softcap: float = 0.0,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attends `q_len` new tokens to the cache and to themselves, then appends their keys and values to the cache, in place.

    Args:
        q: [batch, num_q_heads, q_len, head_dim], float16 or bfloat16 (or float32 on the CPU), after RoPE unless `cos` and
            `sin` are given. Up to `MAX_DECODE_QUERIES` query tokens take a decode kernel (one launch), more the prefill kernel.
        k_new, v_new: [batch, num_kv_heads, q_len, head_dim], keys like q. num_q_heads is 1 to 16 times num_kv_heads.
        k_cache, v_cache: [batch, num_kv_heads, slots, head_dim], any strides with head_dim contiguous; written to. Each either
            in the dtype of q or quantised: float8_e4m3fn, int8, or uint8 [batch, num_kv_heads, slots, head_dim / 2] for int4
            (see `new_cache`). Attention over a quantised cache attends the new tokens, too, as their codes. No memory may be
            shared between what is written to and any other argument.
        seq_lens: [batch] int32, tokens in each row's cache before the call. Not changed: all layers of a model share it.
        pad: [batch] int32, leading columns of this chunk to skip (left padding), clamped to 0 ... q_len. Their output is 0,
            their lse -inf.
        cos, sin: [batch or 1, q_len, rotary_dim], float32 or the dtype of q: tables of the positions of this chunk (what
            transformers passes around as `position_embeddings`). The op then applies RoPE itself: x * cos +
            rotate_half(x) * sin to the first rotary_dim dims of q and k_new, in float32, rounded once; the rotated keys are
            attended and cached. rotary_dim is a multiple of 8, at most head_dim. Up to `MAX_DECODE_QUERIES` tokens.
        heads: [n] int32 on the device of q, distinct: the call serves these KV heads only, and the caches and their scales
            have n heads: cache head i belongs to KV head heads[i] of k_new and v_new, and to its group of query heads. Other
            query heads of out and lse are left as they are (uninitialised where the call makes them). So a layer whose heads
            need different caches takes one call for each kind, into one output, without a copy. On the CPU the numbers are
            checked; on CUDA, where reading them would wait for the GPU, one that does not exist means the last head.
        cache_rows: [batch] int32 on the device of q: batch row i attends and appends to row cache_rows[i] of the caches, their
            scales and seq_lens, of which there may be more or fewer than batch; pad, cos, sin, out and lse stay by batch row.
            -1 skips a row: output 0, lse -inf, no cache is read or written. Rows must be distinct, or two would append to
            one. On the CPU the numbers are checked; on CUDA one that does not exist skips its row.
        out, lse: where to write, shaped like what is returned; out in any strides with head_dim contiguous. Made if None.
        sink, window: `window=0` marks a full cache (retrieval layer). `window >= 1` marks a ring (streaming layer): the query
            at position p sees [0, sink) and (p - window, p]. It has slots >= sink + window, of which those past sink are used
            in turns. With slots - sink - window = slack it can take back its last slack + 1 tokens: by lower seq_lens alone.
            So the caches of a full layer may be attended as a ring, too: what is outside the window is not read, and need
            not have memory.
        scale: factor on q . k; default head_dim ** -0.5.
        workspace: from `new_workspace`; a fresh one is made if None, which costs an allocation per call on CUDA.
        k_scale, v_scale: [batch, num_kv_heads, slots] float32, one scale per vector of a quantised cache; written to. On a GPU,
            v_scale of a head may go 2^110 up from its smallest; beyond that tokens of tiny values may be left out.
        softcap: scaled logits become softcap * tanh(logit / softcap), as in Gemma 2; 0: they stay as they are.
        sink_logits: [num_q_heads] float32 on the device of q: learned logits of gpt-oss, each of a key that has no value: a term
            more in the softmax's denominator, neither scaled nor capped, in every row that is not padding.

    Returns:
        out: [batch, num_q_heads, q_len, head_dim] in the dtype of q (memory order: tokens before heads).
        lse: [batch, num_q_heads, q_len] float32, natural log of the sum of exponentials of the scaled and capped logits, sink
            logits among them: of partial results that are merged, one may have them.

    Raises:
        RuntimeError: a shape, dtype, device, stride or range is not supported; the message names it. Nothing was written.
            A full cache with too few slots left is not detected here (that would wait for the GPU): the kernel
            drops what does not fit. `ZigzagCache` and `ZigzagAttention` check it on the host.

    Based on FlashAttention-2 (https://arxiv.org/abs/2307.08691), Flash-Decoding and StreamingLLM
    (https://arxiv.org/abs/2309.17453); deviation from StreamingLLM: keys keep their absolute RoPE positions. Layers with heads
    of both kinds are DuoAttention's (https://arxiv.org/abs/2410.10819).
    """
    refuse_autograd(q, k_new, v_new)
    if out is None or lse is None:
        new_out, new_lse = new_output(q)
        out, lse = new_out if out is None else out, new_lse if lse is None else lse
    if workspace is None:
        workspace = new_workspace(q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = (q, k_new, v_new, k_cache, v_cache, seq_lens, pad, cos, sin, heads, cache_rows, out, lse, workspace)
    torch.ops.zigzag.attention_(*tensors, sink, window, scale, k_scale, v_scale, softcap, sink_logits)
    return out, lse


def new_output(q: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse of `attention` for q: what several calls, each for some of the heads, write into."""
    if q.dim() != 4:
        raise RuntimeError(f"q must be [batch, num_q_heads, q_len, head_dim], got {list(q.shape)}")
    batch, num_q_heads, q_len, head_dim = q.shape
    out = q.new_empty(batch, q_len, num_q_heads, head_dim).transpose(1, 2)
    return out, q.new_empty(batch, num_q_heads, q_len, dtype=torch.float32)


def append(
    k_new: Tensor,
    v_new: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seq_lens: Tensor,
    *,
    pad: Tensor | None = None,
    cache_rows: Tensor | None = None,
    sink: int = 0,
    window: int = 0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Appends keys and values to a full cache or a ring, in place, without attention. Arguments as in `attention`.

    O(q_len): nothing already in the cache moves. Raises RuntimeError like `attention`.
    """
    refuse_autograd(k_new, v_new)
    torch.ops.zigzag.append_(k_new, v_new, k_cache, v_cache, seq_lens, pad, cache_rows, sink, window, k_scale, v_scale)


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merges attention over two disjoint sets of keys into attention over their union.

    Args:
        out_a, out_b: [batch, num_q_heads, q_len, head_dim] of one dtype.
        lse_a, lse_b: [batch, num_q_heads, q_len] float32; -inf marks a state over no keys.

    Returns:
        out and lse of the union, contiguous, shaped like the inputs.

    Raises:
        RuntimeError: shapes, dtypes or devices differ or are not supported.
    """
    refuse_autograd(out_a, out_b)
    return torch.ops.zigzag.merge_states(out_a, lse_a, out_b, lse_b)


def is_traced() -> bool:
    """Whether the caller is being traced. torch.compiler.is_compiling() is one flag for all threads: what one of them compiles
    would be seen by eager code of the others."""
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def is_captured(q: Tensor) -> bool:
    """Whether a call with q is traced or captured: the graph must serve every length, so nothing may depend on what the host
    knows now."""
    return is_traced() or (q.is_cuda and torch.cuda.is_current_stream_capturing())


def refuse_autograd(*tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("zigzag_ext attention has no backward pass: call it under torch.inference_mode() or torch.no_grad()")


def _check_devices(operator, arguments: tuple, options: dict) -> None:
    """A tensor without memory among others (device "meta") also comes here, and would be taken for a result."""
    names = (argument.name for argument in operator.default._schema.arguments)
    tensors = {n: t for n, t in [*zip(names, arguments, strict=False), *options.items()] if isinstance(t, Tensor)}
    first, like = next(iter(tensors.items()))
    for name, t in tensors.items():
        if t.device != like.device:
            raise RuntimeError(f"{name} must be on the device of {first}, {like.device}; got {t.device}")


@torch.library.register_fake("zigzag::attention_")
def _attention_fake(*arguments, **options):
    _check_devices(torch.ops.zigzag.attention_, arguments, options)


@torch.library.register_fake("zigzag::append_")
def _append_fake(*arguments, **options):
    _check_devices(torch.ops.zigzag.append_, arguments, options)


@torch.library.register_fake("zigzag::merge_states")
def _merge_states_fake(out_a, lse_a, out_b, lse_b):
    _check_devices(torch.ops.zigzag.merge_states, (out_a, lse_a, out_b, lse_b), {})
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
