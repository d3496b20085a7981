"""torch.nn.functional.scaled_dot_product_attention with one backend pinned, grouped heads left to torch."""

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def prepare_backend(problem, backend: SDPBackend):
    problem.need_uniform_single_token()
    p = problem

    def run(i):
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(p.q[i], p.k_cache[i], p.v_cache[i], scale=p.scale, enable_gqa=True)

    return run
