"""Failures that a test puts into a use of a cache."""

import contextlib

import pytest
from hypothesis import strategies as st

from zigzag_ext.attention import ops
from zigzag_ext.attention.buffers import GrowingBuffer

SITES = ["model.embed_tokens", "model.layers.0", "model.layers.1.self_attn.o_proj", "model.layers.2", "model.norm", "lm_head"]


class Injected(Exception):
    """A failure that a test puts somewhere."""


def failing(call, nth: int):
    """`call`, of which the nth call fails."""
    left = [nth]

    def run(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise Injected
        return call(*args, **kwargs)

    return run


nth = st.integers(1, 8)
FAULTS = st.one_of(
    st.none(),
    st.none(),
    st.tuples(st.just("interrupt"), st.floats(0, 1), st.booleans()),
    st.tuples(st.just("module"), st.sampled_from(SITES), st.integers(1, 3)),
    st.tuples(st.just("memory"), nth),
    st.tuples(st.just("op"), nth),
)


@contextlib.contextmanager
def injected(model, fault):
    """Within it the fault happens, unless it is an interrupt."""
    kind = fault and fault[0]
    with pytest.MonkeyPatch.context() as patch:
        if kind == "memory":
            patch.setattr(GrowingBuffer, "commit", failing(GrowingBuffer.commit, fault[1]))
        elif kind == "op":
            patch.setattr(ops, "attention", failing(ops.attention, fault[1]))
        elif kind == "module":
            fail = failing(lambda *args: None, fault[2])
            hook = model.get_submodule(fault[1]).register_forward_pre_hook(fail)
        try:
            yield
        finally:
            if kind == "module":
                hook.remove()
