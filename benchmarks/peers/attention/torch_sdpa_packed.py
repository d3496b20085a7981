"""torch SDPA on the CPU with the query heads of a group packed by hand into the query length of their KV head."""

DEVICES = ("cpu",)


def prepare(problem):
    from torch.nn.functional import scaled_dot_product_attention

    problem.need_uniform_single_token()
    p, cell = problem, problem.cell
    packed = (cell.batch, cell.num_kv_heads, cell.num_q_heads // cell.num_kv_heads, cell.head_dim)

    def run(i):
        out = scaled_dot_product_attention(p.q[i].view(packed), p.k_cache[i], p.v_cache[i], scale=p.scale)
        return out.view(p.q[i].shape)

    return run
