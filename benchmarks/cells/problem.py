"""The tensors of one cell, as many copies as keep the caches cold, and the expected output."""

from functools import cached_property
from itertools import product

import torch
from torch import Tensor

from zigzag_ext.attention import ops, reference
from zigzag_ext.planning.kv_format import parse_kv_format

from .scenarios import QUANTISED, Cell

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Largest ||out - expected|| / ||expected|| over heads: the output and the probabilities are rounded to the dtype.
TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5, **dict.fromkeys(QUANTISED, 1e-2)}
LARGEST = 3.0  # of every vector of a quantised problem: all scales are then equal, as peers with one scale per tensor need
COLD_BYTES = 420_000_000  # eight times the L2 of an H100; a clock may leave out up to 4% of it
QUERY_SIGMA = 2.5  # logits then spread by 2.5: the softmax is neither flat nor one-hot


class Unsupported(Exception):
    """Raised by a peer that cannot serve a cell; the message says why."""


class Problem:
    """Random normal inputs; the new tokens are already in the caches (again appending them changes nothing).

    Lists hold one tensor per set: q [batch, num_q_heads, q_len, head_dim]; k_new, v_new [batch, num_kv_heads, q_len, head_dim];
    k_cache, v_cache [batch, num_kv_heads, slots, head_dim], quantised ones with k_scale, v_scale (else None) [batch,
    num_kv_heads, slots]. seq_lens (before the call) and kv_lens are int32 [batch].
    """

    def __init__(self, cell: Cell, device: str):
        self.cell, self.device, self.dtype = cell, device, DTYPES["bf16" if cell.quantised else cell.kv_format]
        self.scale = cell.head_dim**-0.5
        self.num_sets = max(2, -(-COLD_BYTES // cell.kv_bytes))
        self._generator = torch.Generator(device).manual_seed(2412)
        fresh = (cell.batch, cell.num_kv_heads, cell.q_len, cell.head_dim)
        cache = (cell.batch, cell.num_kv_heads, cell.slots, cell.head_dim)
        self.q = self._normal((cell.batch, cell.num_q_heads, cell.q_len, cell.head_dim), QUERY_SIGMA)
        self.k_new, self.v_new = self._normal(fresh), self._normal(fresh)
        formats = parse_kv_format("kv_format", cell.kv_format if cell.quantised else None)
        self.k_cache, self.k_scale = self._stored(cache, formats.k)
        self.v_cache, self.v_scale = self._stored(cache, formats.v)
        self.seq_lens = torch.tensor(cell.seq_lens, dtype=torch.int32, device=device)
        self.kv_lens = torch.tensor(cell.kv_lens, dtype=torch.int32, device=device)
        self.expected = self._attend_first_set()
        for i in range(1, self.num_sets):
            reference.append(self.k_new[i], self.v_new[i], *self._held(i), **self._options(i))

    def _normal(self, shape: tuple[int, ...], sigma: float = 1.0) -> list[Tensor]:
        def one():
            x = torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, sigma, generator=self._generator)
            return x.div_(x.abs().amax(-1, keepdim=True)).mul_(LARGEST) if self.cell.quantised and sigma == 1.0 else x

        return [one() for _ in range(self.num_sets)]

    def _stored(self, shape: tuple[int, ...], kv_format: str) -> tuple[list[Tensor], list[Tensor | None]]:
        """Random caches and their scales, one of each per set."""
        vectors = self._normal(shape)
        if kv_format == "none":
            return vectors, [None] * self.num_sets
        stored = [ops.new_cache(*shape, self.dtype, self.device, kv_format) for _ in vectors]
        for i, (cache, scale) in enumerate(stored):
            for row, head in product(range(shape[0]), range(shape[1])):  # a head at a time: it widens to float32
                cache[row, head], scale[row, head] = reference.encode(vectors[i][row, head], cache.dtype)
            vectors[i] = None
        return tuple(list(column) for column in zip(*stored, strict=True))

    @property
    def uniform_scale(self) -> float:
        """The scale of every key and value vector of a quantised problem with one format."""
        return LARGEST / reference.MAX_CODE[self.k_cache[0].dtype]

    def _attend_first_set(self) -> Tensor:
        new = (self.q[0], self.k_new[0], self.v_new[0])
        return reference.attention(*new, *self._held(0), **self._options(0), scale=self.scale)[0]

    def _held(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.k_cache[i], self.v_cache[i], self.seq_lens

    def _options(self, i: int) -> dict:
        layout = {"sink": self.cell.sink, "window": self.cell.window}
        return layout | {"k_scale": self.k_scale[i], "v_scale": self.v_scale[i]}

    @cached_property
    def tokens_first(self) -> list[tuple[Tensor, Tensor]]:
        """The caches as [batch, slots, num_kv_heads, head_dim], contiguous, for peers that want that order."""
        return [
            (k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous())
            for k, v in zip(self.k_cache, self.v_cache, strict=True)
        ]

    def error(self, out: Tensor) -> float:
        """Largest relative error over heads of a first-set output [batch, num_q_heads, q_len, head_dim]."""
        if out.shape != self.expected.shape:
            raise ValueError(f"output has shape {tuple(out.shape)}, expected {tuple(self.expected.shape)}")
        difference = (out.double() - self.expected.double()).norm(dim=(2, 3))
        worst = (difference / self.expected.double().norm(dim=(2, 3))).max().item()
        return float("inf") if worst != worst else worst

    def need(self, condition: bool, reason: str) -> None:
        if not condition:
            raise Unsupported(reason)

    def need_uniform_single_token(self) -> None:
        """For peers without lengths per row and without a causal mask over the new tokens."""
        self.need(self.cell.q_len == 1, "one new token only")
        self.need(len(set(self.cell.kv_lens)) == 1, "rows of equal length only")
