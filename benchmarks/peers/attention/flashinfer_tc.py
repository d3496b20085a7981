"""FlashInfer batch decode on tensor cores over a paged cache, planned for the exact lengths outside the timed part."""

DEVICES = ("cuda",)
KV_FORMATS = ("fp8",)
WORKSPACE_BYTES = 256 << 20


def prepare(problem):
    import torch
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    from ._paged import PAGE_SIZE, pages

    p, cell = problem, problem.cell
    p.need(cell.q_len == 1, "one new token only")
    caches, table = pages(p)
    used = [-(-length // PAGE_SIZE) for length in cell.kv_lens]
    indptr = torch.tensor([0, *used], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    indices = torch.cat([row[:n] for row, n in zip(table, used, strict=True)])
    last_page = torch.tensor(
        [length - (n - 1) * PAGE_SIZE for length, n in zip(cell.kv_lens, used, strict=True)], dtype=torch.int32
    )
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=p.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        indptr.to(p.device),
        indices,
        last_page.to(p.device),
        cell.num_q_heads,
        cell.num_kv_heads,
        cell.head_dim,
        PAGE_SIZE,
        q_data_type=p.dtype,
        kv_data_type=p.k_cache[0].dtype,
        sm_scale=p.scale,
    )
    scales = {"k_scale": p.uniform_scale, "v_scale": p.uniform_scale} if cell.quantised else {}
    return lambda i: wrapper.run(p.q[i][:, :, 0], caches[i], **scales).unsqueeze(2)
