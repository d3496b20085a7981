"""Ctrl-C at any line of enable, disable, zigzag() and Engine(...): the model is enabled, or as it was, or `disable` helps."""

import copy

import pytest
import torch
from interrupts import Places
from tiny_models import new_model, prompt

import zigzag_ext as zz

PLAN = zz.Plan(["streaming", "retrieval"], sink=2, window=4)


def logits(model):
    with torch.no_grad():
        return model(prompt(12)).logits


def small_model(wrapped=False):
    model = new_model("llama", num_hidden_layers=2)
    if wrapped:
        model.forward = copy.copy(model.forward)  # an attribute of the model, as accelerate's hooks are
    return model


def with_zigzag(model):
    with zz.zigzag(model, PLAN):
        logits(model)


CALLS = {
    "enable": lambda model: zz.enable(model, PLAN),
    "compile": lambda model: zz.enable(model, PLAN, compile=True),
    "disable": zz.disable,
    "zigzag": with_zigzag,
    "engine": lambda model: zz.Engine(model, PLAN, max_len=64, max_rows=2, memory=1 << 24).close(),
}
GIVE_BACK = ["zigzag", "engine"]  # what leaves the model as it was


@pytest.mark.parametrize("own,wrapped", [(True, False), (False, True)], ids=["line", "any_line-hooked"])
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_place(call, own, wrapped, request):
    def start():
        model = small_model(wrapped)
        return zz.enable(model, PLAN) if call == "disable" else model

    stock, enabled = logits(small_model()), logits(zz.enable(small_model(), PLAN))
    CALLS[call](start())  # imports, and warnings that come once
    counted, model, stopped = Places(own=own), start(), 0
    assert not counted.run(lambda: CALLS[call](model))
    stride = 1 if request.config.getoption("--long") else max(1, counted.count // 12)
    for at in range(1, counted.count + 1, stride):
        model = start()
        config, names = model.config, set(vars(model))
        stopped += Places(at, own=own).run(lambda model=model: CALLS[call](model))
        try:
            zz.disable(model)
            assert call not in GIVE_BACK
        except RuntimeError as error:
            assert "not enabled" in str(error)
        assert logits(model).equal(stock), at
        if call != "disable":
            assert set(vars(model)) == names and ("forward" in names) == wrapped
        assert zz.enable(model, PLAN) is model and logits(model).equal(enabled), at
        zz.disable(model)
        assert logits(model).equal(stock) and model.config._attn_implementation == config._attn_implementation == "sdpa"
    assert stopped >= 0.9 * len(range(1, counted.count + 1, stride))
