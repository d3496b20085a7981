"""FlashAttention-3 (PyPI fa3-fwd), attention over the cache with lengths per row."""

DEVICES = ("cuda",)


def prepare(problem):
    from fa3_fwd_interface import flash_attn_with_kvcache

    p = problem
    p.need(p.cell.kv_format == "bf16", "bf16 only in this build")
    queries = [q.transpose(1, 2).contiguous() for q in p.q]

    def run(i):
        k, v = p.tokens_first[i]
        causal = p.cell.q_len > 1
        out = flash_attn_with_kvcache(queries[i], k, v, cache_seqlens=p.kv_lens, softmax_scale=p.scale, causal=causal)
        return out.transpose(1, 2)

    return run
