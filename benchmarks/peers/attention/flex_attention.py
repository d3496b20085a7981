"""torch FlexAttention, compiled (flex decoding); lengths per row and causality by a block mask made outside the timed part."""

DEVICES = ("cuda",)


def prepare(problem):
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    p, cell = problem, problem.cell
    lengths = p.kv_lens

    def visible(batch, head, query, key):
        return key <= lengths[batch] - cell.q_len + query

    plain = cell.q_len == 1 and len(set(cell.kv_lens)) == 1
    mask = None if plain else create_block_mask(visible, cell.batch, None, cell.q_len, cell.slots, device=p.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda i: compiled(p.q[i], p.k_cache[i], p.v_cache[i], block_mask=mask, scale=p.scale, enable_gqa=True)
