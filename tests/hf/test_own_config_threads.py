"""The config of an enabled model while several threads are inside compiled steps of it."""

import pytest
from tiny_models import new_model

import zigzag_ext as zz
from zigzag_ext.hf.own_config import plain_name


@pytest.mark.parametrize("first_out", [0, 1])
def test_overlapping_steps_leave_the_name_that_knows_the_former_one(first_out):
    model = new_model("llama")
    former = model.config._attn_implementation
    zz.enable(model, zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16))
    own = model.config._attn_implementation
    steps = plain_name(model), plain_name(model)
    for step in steps:
        step.__enter__()
    steps[first_out].__exit__(None, None, None)
    assert type(model.config._attn_implementation) is str
    steps[1 - first_out].__exit__(None, None, None)
    assert model.config._attn_implementation is own
    assert zz.disable(model).config._attn_implementation == former
