"""FlashInfer single-sequence decode on CUDA cores."""

DEVICES = ("cuda",)


def prepare(problem):
    from flashinfer import single_decode_with_kv_cache

    p = problem
    p.need(p.cell.batch == 1 and p.cell.q_len == 1, "one row, one new token only")

    def run(i):
        k, v = p.tokens_first[i]
        out = single_decode_with_kv_cache(p.q[i][0, :, 0], k[0], v[0], kv_layout="NHD", use_tensor_cores=False, sm_scale=p.scale)
        return out[None, :, None]

    return run
