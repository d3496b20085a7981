"""Models whose layers hold recurrent or convolution states: exact without a plan, and under one that streams some full layers.

Compared with stock eager attention in the same forwards: a recurrence rounds otherwise in other chunks.
"""

import pytest
import torch
import transformers
from against_stock import streaming_plan
from dense_oracle import close, dense_oracle, logits_of, stock, traced_only
from tiny_models import HYBRID, generate, new_model, padded_prompt, prompt
from transformers import DynamicCache

import zigzag_ext as zz
from zigzag_ext.cache import states
from zigzag_ext.hf import compiled
from zigzag_ext.hf.cache_argument import cache_argument

pytestmark = pytest.mark.skipif(not states.SERVED, reason=f"transformers {transformers.__version__} has no classes for states")
TRACED = ["falcon_h1"]  # a state beside keys; `test_compiled_steps` has one in the place of keys
REFUSED = {
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}, "start from no state in a forward"),
    "mamba": ({}, "none of its layers has attention"),
    "minimax": ({"layer_types": ["linear_attention", "full_attention"] * 2}, "a cache of its own .MiniMaxCache"),
    "zamba2": ({"layers_block_type": ["linear_attention", "hybrid"] * 2}, "its attention modules serve several layers each"),
}


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", HYBRID)
    if "traced_family" in metafunc.fixturenames:
        metafunc.parametrize("traced_family", HYBRID if metafunc.config.getoption("--long") else TRACED)


@pytest.fixture
def model(family):
    return new_model(family)


def in_chunks(model, cache, ids, chunk: int) -> torch.Tensor:
    """Logits of a prompt that comes in several forwards."""
    given = cache_argument(model, cache)
    starts = range(0, ids.shape[1], chunk)
    positions = [torch.arange(start, min(start + chunk, ids.shape[1]))[None] for start in starts]
    parts = zip(ids.split(chunk, 1), positions, strict=True)
    with torch.no_grad():
        return torch.cat([model(part, position_ids=place, **given).logits for part, place in parts], 1)


def test_one_shot_and_every_chunking(model):
    ids = prompt(61, batch=2)
    with torch.no_grad(), stock(model):
        whole = model(ids).logits
    with torch.no_grad(), zz.zigzag(model):
        assert close(model(ids, use_cache=False).logits, whole)
        assert close(model(ids).logits, whole)
    for chunk in (23, 5):
        with stock(model):
            expected = in_chunks(model, DynamicCache(config=model.config), ids, chunk)
        assert torch.allclose(expected, whole, rtol=1e-3, atol=1e-3), "transformers itself forgets the chunk before"
        with zz.zigzag(model):
            assert close(in_chunks(model, zz.ZigzagCache(model.config), ids, chunk), expected), f"chunks of {chunk}"


@pytest.mark.parametrize("plan_of", [lambda model: None, streaming_plan], ids=["as_it_is", "streaming"])
def test_padded_batch_and_decoding(model, plan_of):
    plan, batch = plan_of(model), padded_prompt([30, 17, 3])
    with stock(model) if plan is None else dense_oracle(model, plan.kinds, 2, 5):
        expected, expected_logits = logits_of(model, 24, **batch)
    with zz.zigzag(model, plan):
        answer, logits = logits_of(model, 24, **batch)
    assert answer.equal(expected) and close(logits, expected_logits)


@pytest.mark.parametrize("refused", REFUSED)
def test_families_that_are_refused_by_name(refused):
    options, words = REFUSED[refused]
    model = new_model(refused, **options)
    with pytest.raises(ValueError, match=f"{refused} is not supported by zigzag attention: .*{words}"):
        zz.enable(model)


def test_a_layer_that_does_not_use_the_states_of_the_cache(monkeypatch):
    model = new_model("lfm2")
    monkeypatch.setattr(model.model.layers[2].conv, "forward", lambda hidden_states, **kwargs: hidden_states)
    with zz.zigzag(model), torch.no_grad(), pytest.raises(RuntimeError, match=r"layers \[2\] never read the states"):
        model(prompt(20))


def test_beams(model):
    batch = padded_prompt([20, 11])
    with stock(model):
        expected = generate(model, 12, num_beams=3, **batch)
    with zz.zigzag(model):
        assert generate(model, 12, num_beams=3, **batch).equal(expected)


def test_compiled_steps():
    model, batch = new_model("lfm2", num_hidden_layers=2, layer_types=["conv", "full_attention"]), padded_prompt([30, 17])
    with stock(model):
        expected, expected_logits = logits_of(model, 20, **batch)
    with zz.zigzag(model, compile=True):
        answer, logits = logits_of(model, 20, **batch)
    assert answer.equal(expected) and close(logits, expected_logits)


def test_traced_steps(traced_family, monkeypatch):
    monkeypatch.setattr(compiled._Backend, "__call__", traced_only)
    layers = {"num_hidden_layers": 2} if traced_family == "falcon_h1" else {}  # others name theirs
    model, batch = new_model(traced_family, **layers), padded_prompt([30, 17, 3])
    plan = streaming_plan(model)
    with dense_oracle(model, plan.kinds, 2, 5):
        expected, expected_logits = logits_of(model, 20, **batch)
    with zz.zigzag(model, plan, compile=True):
        for _ in range(2):  # the second call has a cache on the memory of the first one
            answer, logits = logits_of(model, 20, **batch)
            assert answer.equal(expected) and close(logits, expected_logits)
