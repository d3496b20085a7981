"""The caches as pages, for the peers that read nothing else: page i of row b is its tokens [i * size, (i + 1) * size)."""

import torch

PAGE_SIZE = 64


def pages(problem):
    """K and V of every set as [batch * pages_per_row, PAGE_SIZE, num_kv_heads, head_dim]; table int32 [batch, pages_per_row]."""
    cell = problem.cell
    problem.need(cell.slots % PAGE_SIZE == 0, f"whole pages of {PAGE_SIZE} tokens only")
    shape = (-1, PAGE_SIZE, cell.num_kv_heads, cell.head_dim)
    caches = [(k.view(shape), v.view(shape)) for k, v in problem.tokens_first]
    per_row = cell.slots // PAGE_SIZE
    table = torch.arange(cell.batch * per_row, dtype=torch.int32, device=problem.device).view(cell.batch, per_row)
    return caches, table
