"""This package, through the torch op: attention and the append of the new token in one launch."""

from ...cells.scenarios import QUANTISED

DEVICES = ("cuda", "cpu")
KV_FORMATS = QUANTISED


def prepare(problem):
    from zigzag_ext.attention import ops

    p, cell = problem, problem.cell
    workspace = ops.new_workspace(p.device)

    def run(i):
        tensors = (p.q[i], p.k_new[i], p.v_new[i], p.k_cache[i], p.v_cache[i], p.seq_lens)
        scales = {"k_scale": p.k_scale[i], "v_scale": p.v_scale[i]}
        return ops.attention(*tensors, sink=cell.sink, window=cell.window, scale=p.scale, workspace=workspace, **scales)[0]

    return run
