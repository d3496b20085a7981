"""What benchmarks/prefill.py measures: shapes, their tensors, a cheap oracle, and everything that is timed on them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zigzag_ext.attention import backends as prefill_backends
from zigzag_ext.attention import ops
from zigzag_ext.attention import routes as prefill

from .problem import QUERY_SIGMA, Unsupported

K = 1024
DECODE_ROWS = ops.MAX_DECODE_QUERIES
FULL = "full_"  # a peer that attends everything in a streaming cell: what the layer would cost as a retrieval layer


@dataclass(frozen=True)
class PrefillCell:
    """One chunk of `tokens` new tokens on `past` cached ones. `window == 0` is a retrieval layer."""

    scenario: str
    tokens: int
    past: int = 0
    sink: int = 0
    window: int = 0
    impls: tuple[str, ...] = ("zigzag",)
    batch: int = 1
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    kv_format: str = "none"  # of a full cache

    def keys_seen(self, impl: str = "zigzag") -> int:
        """(query, key) pairs of one head that `impl` has to compute."""
        n = self.tokens
        if impl == "cudnn_dense":
            return n * (self.past + n)
        if not self.window or impl.startswith(FULL):
            return n * self.past + n * (n + 1) // 2
        positions = range(self.past, self.past + n)
        return sum(min(p + 1, self.window) + min(max(p + 1 - self.window, 0), self.sink) for p in positions)

    def flops(self, impl: str = "zigzag") -> int:
        return 4 * self.batch * self.num_q_heads * self.head_dim * self.keys_seen(impl)


STREAM = {"sink": 64, "window": 256}
ROUTES = ("zigzag", "zigzag_kernel", "route_fa3", "cudnn", "flash", "fa3")
SHORT = ("zigzag", "zigzag_kernel", "decode_calls", "route_flash", "route_cudnn")
CHUNK = ("zigzag", "zigzag_kernel", "route_flash", "route_cudnn", "route_fa3", "cudnn_dense")
CODES = ("zigzag", "zigzag_kernel", "route_flash")

CUDA = [
    PrefillCell("streaming_16k", 16 * K, **STREAM, impls=("zigzag", "flex_attention")),
    PrefillCell("streaming_64k", 64 * K, **STREAM, impls=("zigzag", "flex_attention")),
    PrefillCell("streaming_128k", 128 * K, **STREAM, impls=("zigzag", "full_cudnn", "full_flash", "full_fa3")),
    PrefillCell("streaming_256k", 256 * K, **STREAM),
    PrefillCell("retrieval_4k", 4 * K, impls=ROUTES),
    PrefillCell("retrieval_16k", 16 * K, impls=ROUTES),
    PrefillCell("retrieval_64k", 64 * K, impls=ROUTES),
    PrefillCell(
        "chunk_8k_on_128k",
        8 * K,
        128 * K,
        impls=("zigzag", "zigzag_kernel", "route_cudnn", "route_flash", "route_fa3", "cudnn_dense"),
    ),
    PrefillCell("chunk_2k_on_32k", 2 * K, 32 * K, impls=("zigzag", "zigzag_kernel", "route_cudnn", "route_flash")),
    *(
        PrefillCell(f"short_{tokens}_on_{past // K}k", tokens, past, impls=SHORT)
        for tokens, past in [(17, K), (64, K), (17, 2 * K), (64, 2 * K), (17, 8 * K), (64, 8 * K), (17, 32 * K), (64, 32 * K)]
        + [(64, 128 * K), (256, 8 * K), (256, 32 * K), (512, 8 * K), (512, 32 * K), (1024, 8 * K), (1024, 32 * K)]
    ),
    *(PrefillCell(f"prefill_{n}_on_32k", n, 32 * K, impls=CHUNK) for n in (17, 32, 64, 128, 256, 512, 1024, 2048)),
    *(
        PrefillCell(f"prefill_{kv_format}_{n}_on_32k", n, 32 * K, impls=CODES, kv_format=kv_format)
        for kv_format in ("fp8", "int8", "int4")
        for n in (64, 512, 1024)
    ),
]
_TINY = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.float32}
CPU = [
    PrefillCell("streaming_2k", 2 * K, **STREAM, impls=("zigzag", "full_torch_cpu"), **_TINY),
    PrefillCell("retrieval_2k", 2 * K, impls=("zigzag", "torch_cpu"), **_TINY),
    PrefillCell("chunk_512_on_2k", 512, 2 * K, impls=("zigzag", "route_torch_cpu"), **_TINY),
    PrefillCell("short_64_on_2k", 64, 2 * K, impls=("zigzag", "decode_calls", "route_torch_cpu"), **_TINY),
    PrefillCell("prefill_fp8_64_on_2k", 64, 2 * K, impls=("zigzag", "route_torch_cpu"), kv_format="fp8", **_TINY),
]
BY_DEVICE = {"cuda": CUDA, "cpu": CPU}


class PrefillProblem:
    """Random tensors: q, k_new, v_new of the chunk; keys, values [batch, num_kv_heads, past + tokens, head_dim], the past too."""

    def __init__(self, cell: PrefillCell, device: str):
        self.cell, self.device, self.scale = cell, device, cell.head_dim**-0.5
        self._generator = torch.Generator(device).manual_seed(2412)
        total = cell.past + cell.tokens
        # Tokens before heads in memory, as a model's projections leave q, k and v; caches have heads before tokens.
        self.q = self._normal((cell.batch, cell.tokens, cell.num_q_heads, cell.head_dim), QUERY_SIGMA).transpose(1, 2)
        self.keys, self.values = (self._normal((cell.batch, cell.num_kv_heads, total, cell.head_dim)) for _ in "kv")
        self.k_new, self.v_new = (
            t[:, :, cell.past :].transpose(1, 2).contiguous().transpose(1, 2) for t in (self.keys, self.values)
        )
        self.lengths = torch.full((cell.batch,), cell.past, dtype=torch.int32, device=device)
        self.codes = self._quantise() if cell.kv_format != "none" else None
        self.rows = sorted({0, 1, cell.tokens // 3, cell.tokens - 2, cell.tokens - 1} & set(range(cell.tokens)))

    def _normal(self, shape: tuple[int, ...], sigma: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=self.cell.dtype, device=self.device).normal_(0, sigma, generator=self._generator)

    def _quantise(self) -> ops.KvBuffers:
        """Caches of codes that hold all tokens; keys and values become what the codes mean."""
        cell, total = self.cell, self.keys.shape[2]
        shape = (cell.batch, cell.num_kv_heads, total, cell.head_dim, cell.dtype, self.device, cell.kv_format)
        (k_cache, k_scale), (v_cache, v_scale) = (ops.new_cache(*shape) for _ in "kv")
        ops.append(self.keys, self.values, k_cache, v_cache, torch.zeros_like(self.lengths), k_scale=k_scale, v_scale=v_scale)
        codes = ops.KvBuffers(k_cache, v_cache, k_scale, v_scale)
        self.keys, self.values = prefill.Stored.of(codes, torch.float32).read(0, total)
        return codes

    def caches(self) -> ops.KvBuffers:
        """The full buffers (the new tokens will be written where they already are), or a ring for a streaming layer."""
        if self.codes is not None:
            return self.codes
        if not self.cell.window:
            return ops.KvBuffers(self.keys, self.values)
        shape = (self.cell.batch, self.cell.num_kv_heads, self.cell.sink + self.cell.window, self.cell.head_dim)
        return ops.KvBuffers(*(torch.empty(shape, dtype=self.cell.dtype, device=self.device) for _ in "kv"))

    def error(self, out: Tensor, impl: str) -> float:
        """Largest relative error over all heads of a few sampled rows, in float64; infinite for NaN."""
        cell, worst = self.cell, 0.0
        if out.shape != self.q.shape:
            raise ValueError(f"output has shape {tuple(out.shape)}, expected {tuple(self.q.shape)}")
        key = torch.arange(cell.past + cell.tokens, device=self.device)
        for row in self.rows:
            query = cell.past + row
            seen = torch.ones_like(key, dtype=torch.bool) if impl == "cudnn_dense" else key <= query
            if cell.window and not impl.startswith(FULL):
                seen &= (key < cell.sink) | (query - key < cell.window)
            for head in range(cell.num_kv_heads):
                group = slice(head * cell.num_q_heads // cell.num_kv_heads, (head + 1) * cell.num_q_heads // cell.num_kv_heads)
                k, v = (t[:, head, seen].double() for t in (self.keys, self.values))
                scores = self.q[:, group, row].double() @ k.transpose(1, 2) * self.scale
                expected = scores.softmax(-1) @ v
                difference = (out[:, group, row].double() - expected).norm(dim=-1) / expected.norm(dim=-1)
                worst = max(worst, float(torch.nan_to_num(difference, nan=torch.inf).max()))
        return worst


def prepare(impl: str, p: PrefillProblem) -> Callable[[], Tensor]:
    """run() -> out [batch, num_q_heads, tokens, head_dim], nothing but the timed work. Raises Unsupported or ImportError."""
    if impl in _SPECIAL:
        return _SPECIAL[impl](p)
    if impl == "zigzag":
        return _route(p, "auto")
    if impl == "zigzag_kernel":
        return _route(p, "zigzag")
    if impl.startswith("route_"):
        return _route(p, impl.removeprefix("route_"))
    return _raw(p, impl.removeprefix(FULL))


def _route(p: PrefillProblem, backend: str) -> Callable[[], Tensor]:
    """Through this package, as a cache layer calls it: attention and the append of the new tokens."""
    cell, caches = p.cell, p.caches()
    workspace = ops.new_workspace(p.device)
    options = {"past": cell.past, "sink": cell.sink, "window": cell.window, "scale": p.scale, "workspace": workspace}
    _check_served(p, backend)

    def run():
        with prefill.prefill_options(backend):
            return prefill.attend(p.q, p.k_new, p.v_new, caches, p.lengths, **options)

    return run


def _raw(p: PrefillProblem, backend: str) -> Callable[[], Tensor]:
    """The library's own call over keys that are already in place: no append, no merge."""
    _check_served(p, backend)
    call = prefill_backends.BACKENDS[backend]
    if p.cell.past and not call.bottom_right:
        raise Unsupported("causal with more keys than queries")
    return lambda: call.call(p.q, p.keys, p.values, True, p.scale)[0]


def _check_served(p: PrefillProblem, backend: str) -> None:
    if backend in prefill_backends.BACKENDS and not prefill_backends.serves(backend, p.q.device, p.cell.dtype, p.cell.head_dim):
        raise Unsupported(f"{backend} does not serve {p.cell.dtype} with head_dim {p.cell.head_dim} here")


def _cudnn_dense(p: PrefillProblem) -> Callable[[], Tensor]:
    """cuDNN without a mask: what it reaches at its best on these keys."""
    _check_served(p, "cudnn")
    return lambda: prefill_backends.BACKENDS["cudnn"].call(p.q, p.keys, p.values, False, p.scale)[0]


def _decode_calls(p: PrefillProblem) -> Callable[[], Tensor]:
    """The decode kernel, 16 rows at a time."""
    cell, caches = p.cell, p.caches()
    workspace = ops.new_workspace(p.device)
    pieces = [slice(start, start + DECODE_ROWS) for start in range(0, cell.tokens, DECODE_ROWS)]
    calls = [([t[:, :, piece] for t in (p.q, p.k_new, p.v_new)], p.lengths + piece.start) for piece in pieces]
    options = {"sink": cell.sink, "window": cell.window, "scale": p.scale, "workspace": workspace} | caches.scales
    return lambda: torch.cat([ops.attention(*new, *caches[:2], lengths, **options)[0] for new, lengths in calls], 2)


def _flex_attention(p: PrefillProblem) -> Callable[[], Tensor]:
    """torch FlexAttention with the same band as a block mask, made outside the timed part."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    cell = p.cell
    if p.device != "cuda" or cell.past:
        raise Unsupported("one-shot prompts on CUDA only")

    def visible(batch, head, query, key):
        return (key <= query) & ((key < cell.sink) | (query < key + cell.window))  # nothing but bools of tokens x tokens

    mask = create_block_mask(visible, None, None, cell.tokens, cell.tokens, device=p.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(p.q, p.keys, p.values, block_mask=mask, scale=p.scale, enable_gqa=True)


_SPECIAL = {"cudnn_dense": _cudnn_dense, "decode_calls": _decode_calls, "flex_attention": _flex_attention}
