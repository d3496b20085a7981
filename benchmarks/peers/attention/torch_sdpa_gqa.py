"""torch SDPA on the CPU with enable_gqa: what transformers calls."""

DEVICES = ("cpu",)


def prepare(problem):
    from torch.nn.functional import scaled_dot_product_attention

    problem.need_uniform_single_token()
    p = problem
    return lambda i: scaled_dot_product_attention(p.q[i], p.k_cache[i], p.v_cache[i], scale=p.scale, enable_gqa=True)
