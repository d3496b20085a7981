"""FlashInfer's XQA (from TensorRT-LLM) over a paged cache."""

DEVICES = ("cuda",)
KV_FORMATS = ("fp8",)
WORKSPACE_BYTES = 256 << 20  # the first 8 MiB are semaphores and must start at zero


def prepare(problem):
    import torch
    from flashinfer.decode import xqa_batch_decode_with_kv_cache

    from ._paged import pages

    p, cell = problem, problem.cell
    p.need(cell.q_len == 1, "one new token only")
    caches, table = pages(p)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=p.device)
    queries = [q[:, :, 0].contiguous() for q in p.q]
    lengths = p.kv_lens.to(torch.uint32)
    factor = p.uniform_scale if cell.quantised else 1.0
    scales = {"bmm1_scale": p.scale * factor, "bmm2_scale": factor}

    def run(i):
        out = xqa_batch_decode_with_kv_cache(
            queries[i], caches[i], workspace, table, lengths, cell.slots, kv_layout="NHD", **scales
        )
        return out.unsqueeze(2)

    return run
