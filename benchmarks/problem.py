"""The tensors of one cell, as many copies as keep the caches cold, and the expected output."""

from functools import cached_property

import torch
from scenarios import Cell
from torch import Tensor

from zigzag_ext import reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Largest ||out - expected|| / ||expected|| over heads: the output and the probabilities are rounded to the dtype.
TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5}
COLD_BYTES = 420_000_000  # eight times the L2 of an H100; a clock may leave out up to 4% of it
QUERY_SIGMA = 2.5  # logits then spread by 2.5: the softmax is neither flat nor one-hot


class Unsupported(Exception):
    """Raised by a peer that cannot serve a cell; the message says why."""


class Problem:
    """Random normal inputs; the new tokens are already in the caches (again appending them changes nothing).

    Lists hold one tensor per set: q [batch, num_q_heads, q_len, head_dim]; k_new, v_new [batch, num_kv_heads, q_len, head_dim];
    k_cache, v_cache [batch, num_kv_heads, slots, head_dim]. seq_lens (before the call) and kv_lens are int32 [batch].
    """

    def __init__(self, cell: Cell, device: str):
        self.cell, self.device, self.dtype = cell, device, DTYPES[cell.kv_format]
        self.scale = cell.head_dim**-0.5
        self.num_sets = max(2, -(-COLD_BYTES // cell.kv_bytes))
        self._generator = torch.Generator(device).manual_seed(2412)
        fresh = (cell.batch, cell.num_kv_heads, cell.q_len, cell.head_dim)
        cache = (cell.batch, cell.num_kv_heads, cell.slots, cell.head_dim)
        self.q = self._normal((cell.batch, cell.num_q_heads, cell.q_len, cell.head_dim), QUERY_SIGMA)
        self.k_new, self.v_new = self._normal(fresh), self._normal(fresh)
        self.k_cache, self.v_cache = self._normal(cache), self._normal(cache)
        self.seq_lens = torch.tensor(cell.seq_lens, dtype=torch.int32, device=device)
        self.kv_lens = torch.tensor(cell.kv_lens, dtype=torch.int32, device=device)
        self.expected = self._attend_first_set()
        for tensors in list(zip(self.k_new, self.v_new, self.k_cache, self.v_cache, strict=True))[1:]:
            reference.append_(*tensors, self.seq_lens, None, cell.sink, cell.window)

    def _normal(self, shape: tuple[int, ...], sigma: float = 1.0) -> list[Tensor]:
        def one():
            return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, sigma, generator=self._generator)

        return [one() for _ in range(self.num_sets)]

    def _attend_first_set(self) -> Tensor:
        tensors = (self.q[0], self.k_new[0], self.v_new[0], self.k_cache[0], self.v_cache[0])
        return reference.attention_(*tensors, self.seq_lens, None, self.cell.sink, self.cell.window, self.scale)[0]

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
