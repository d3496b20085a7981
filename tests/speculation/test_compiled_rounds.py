"""With enable(compile=True) verification and drafts are compiled graphs, of few lengths, that give the eager tokens."""

import pytest
import torch
from tiny_models import new_model, padded_prompt, prompt
from torch._dynamo.utils import counters

import zigzag_ext as zz

PLAN = zz.Plan(["streaming", "retrieval"], sink=4, window=16)
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def model():
    """Compiled for drafts of up to three tokens: forwards of one and of four columns, and a step of the draft."""
    model = new_model("llama", num_hidden_layers=2)
    with zz.zigzag(model, PLAN, max_len=256, compile=True):
        counters.clear()  # of tests before
        for given in ({"input_ids": prompt(20)}, padded_prompt([20, 9, 3])):
            for draft in ("streaming", "off"):
                model.generate(**given, **GREEDY, custom_generate=zz.speculate(draft, tokens=3, window=8))
        assert counters["stats"]["unique_graphs"] == 6 and not counters["graph_break"]
        yield model


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[30], [5, 30, 17, 9, 22], [40, 3]])
def test_tokens_are_the_eager_ones_and_nothing_is_compiled_again(model, lengths, force_drafts):
    given = padded_prompt(lengths)
    with zz.zigzag(new_model("llama", num_hidden_layers=2), PLAN) as eager:
        expected = eager.generate(**given, **GREEDY)
    with torch.compiler.set_stance("fail_on_recompile"):
        streaming = zz.speculate("streaming", tokens=3, window=8)
        assert model.generate(**given, **GREEDY, custom_generate=streaming).equal(expected)
        assert 0 < streaming.report.accepted["streaming"] < streaming.report.drafted["streaming"]
        for right in (0, 2, 3):
            force_drafts(expected[:, max(lengths) :], right)
            lookup = zz.speculate("lookup", tokens=3)
            assert model.generate(**given, **GREEDY, custom_generate=lookup).equal(expected)
            assert lookup.report.rounds == -(-39 // (right + 1))
        with torch.inference_mode():
            again = zz.speculate("streaming", tokens=3, window=8)
            assert model.generate(**given, **GREEDY, custom_generate=again).equal(expected)


@pytest.mark.slow
def test_sampled_drafts_are_compiled_too(model):
    torch.manual_seed(0)
    options = GREEDY | {"do_sample": True, "temperature": 0.7}
    with torch.compiler.set_stance("fail_on_recompile"):
        speculation = zz.speculate("streaming", tokens=3, window=8)
        ids = model.generate(**padded_prompt([12, 20]), **options, custom_generate=speculation)
    assert ids.shape == (2, 60) and speculation.report.accepted["streaming"]
