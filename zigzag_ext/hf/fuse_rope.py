"""RoPE moves into the attention launch: a pass over the graph that torch.compile traces from a model's own forward.

Where both the query and the new key of a zigzag op are  x * cos + rotate_half(x) * sin  of the same tables, the op is given the
two x and the tables instead, and rotates in the launch that attends and appends (in float32, rounded once). The tables remain
the model's own computation, whatever its frequencies and scaling. RoPE in any other form (interleaved pairs, a norm after it,
none) stays in the graph as it is, and so does what is written to in place, or laid out as the op does not read it.
"""

import operator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

_OP = torch.ops.zigzag.attention_
_Q, _K, _COS, _SIN = 0, 1, 7, 8  # its arguments
_ADD, _MUL, _NEG = {operator.add, torch.add}, {operator.mul, torch.mul}, {operator.neg, torch.neg}
_UNIT = 8  # rotary_dim is a multiple of it: whole vectors of the kernels


class _Rotated(NamedTuple):
    """The first dims of x [batch, heads, q_len, head_dim] rotated by cos and sin [batch or 1, q_len, rotary_dim]."""

    x: Node
    cos: Node
    sin: Node


def fuse_rope(graph: Graph) -> int:
    """Rewrites, in place, the zigzag ops whose RoPE is recognised, and returns how many. The compiler drops what nobody uses."""
    fused = 0
    for node in graph.nodes:
        if node.target is not _OP or node.args[_COS] is not None:
            continue
        q, k = _rotated(node.args[_Q]), _rotated(node.args[_K])
        if q is not None and k is not None and q[1:] == k[1:]:
            for index, value in ((_Q, q.x), (_K, k.x), (_COS, q.cos), (_SIN, q.sin)):
                node.update_arg(index, value)
            fused += 1
    return fused


def _rotated(node: Node) -> _Rotated | None:
    """What `node` is the rotation of, or None. Casts that leave the dtype of x in the end are left out: they only round more."""
    rotated, node = _value(node), _uncast(node)
    if (halves := _joined(node)) is None:
        found = _full_rotation(node)
    else:  # cat(rotation of the first dims, the other dims as they are)
        found, rest = _full_rotation(halves[0]), _columns(halves[1])
        first = found and _columns(found.x)
        if not (first and rest and first[0] is rest[0] and (first[1], first[2], rest[2]) == (0, rest[1], _width(rest[0]))):
            return None
        found = found._replace(x=first[0])
    if found is None or not all(_is_unwritten(part) and _is_readable(_value(part)) for part in found):
        return None
    x, *tables = map(_value, found)
    fits = (x.shape, x.dtype) == (rotated.shape, rotated.dtype)
    fits = fits and all(t.dim() == 3 and t.dtype in (x.dtype, torch.float32) and t.shape == tables[0].shape for t in tables)
    fits = fits and tables[0].dtype == tables[1].dtype and tables[0].shape[1] == x.shape[2]
    return found if fits and tables[0].shape[2] % _UNIT == 0 else None


def _full_rotation(node: Node) -> _Rotated | None:
    """For x * cos + rotate_half(x) * sin over all dims of x."""
    for plain, turned in _either_order(node, _ADD):
        for half, sin in _either_order(turned, _MUL):
            for x, cos in _either_order(plain, _MUL):
                tables = _table(cos), _table(sin)
                if None not in tables and _turns(half, x) and _width(tables[0]) == _width(x):
                    return _Rotated(_uncast(x), *tables)
    return None


def _turns(node: Node, x: Node) -> bool:
    """Whether `node` is cat(-x[..., d / 2 :], x[..., : d / 2])."""
    halves, d = _joined(node), _width(x)
    if halves is None or not _calls(halves[0], _NEG):
        return False
    second, first = _columns(halves[0].args[0]), _columns(halves[1])
    return (first, second) == ((x, 0, d // 2), (x, d // 2, d))


def _table(node: Node) -> Node | None:
    """The table [batch or 1, q_len, rotary_dim] that `node` lays out for all heads."""
    unsqueezed = node.op == "call_method" and node.target == "unsqueeze" and node.args[1:] == (1,)
    return node.args[0] if unsqueezed else None


def _columns(node: Node) -> tuple[Node, int, int] | None:
    """Source, first and end column for x[..., a:b]."""
    if not _calls(node, {operator.getitem}) or not isinstance(node.args[1], tuple):
        return None
    source, index = node.args
    if len(index) != 2 or index[0] is not Ellipsis or not isinstance(index[1], slice) or index[1].step not in (None, 1):
        return None
    bounds = (index[1].start, index[1].stop)
    if not isinstance(source, Node) or any(isinstance(bound, Node) for bound in bounds):
        return None
    start, stop, _ = index[1].indices(_width(source))
    return source, start, stop


def _joined(node: Node) -> tuple[Node, Node] | None:
    """The operands of cat((a, b), dim=-1)."""
    if not _calls(node, {torch.cat}) or "tensors" in node.kwargs:
        return None
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    return tuple(node.args[0]) if len(node.args[0]) == 2 and dim == -1 else None


def _either_order(node: Node, operation: set) -> list[tuple[Node, Node]]:
    """The operands of a commutative operation, both ways round; none if `node` is another operation, or one with a number."""
    if not _calls(node, operation) or node.kwargs or not all(isinstance(a, Node) for a in node.args):
        return []
    return [node.args, node.args[::-1]]


def _uncast(node: Node) -> Node:
    while node.op == "call_method" and node.target in ("to", "float", "type_as") and _same_device(node) and _is_unwritten(node):
        node = node.args[0]
    return node


def _same_device(node: Node) -> bool:
    return _value(node).device == _value(node.args[0]).device


def _calls(node: Node, operation: set) -> bool:
    return node.op == "call_function" and node.target in operation and _is_unwritten(node)


def _is_unwritten(node: Node) -> bool:
    """Whether nothing in the graph writes in place to the value, its base or a view of it: the op reads at another time."""
    value = _value(node)
    if not isinstance(value, Tensor):
        return True
    return not value.is_inference() and value._version == 0  # tensors of inference mode keep no count of writes


def _is_readable(t: Tensor) -> bool:
    """Whether the op takes the layout: last dim contiguous, every row at a multiple of 16 bytes."""
    steps = [t.storage_offset(), *(step for step, size in zip(t.stride()[:-1], t.shape, strict=False) if size != 1)]
    return t.stride(-1) == 1 and all(step * t.itemsize % 16 == 0 for step in steps)


def _value(node: Node) -> Tensor:
    """The fake tensor that was traced."""
    return node.meta["example_value"]


def _width(node: Node) -> int:
    return _value(node).shape[-1]
