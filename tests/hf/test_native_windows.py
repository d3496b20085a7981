"""Models with sliding windows of their own: exact without a plan, and under one that streams some of their full layers.

Compared with stock eager attention on the model's own masks, in float32.
"""

import pytest
import torch
from against_stock import streaming_plan
from dense_oracle import close, dense_oracle, logits_of, next_logits, stock, traced_only
from tiny_models import WINDOWED, generate, new_model, padded_prompt, prompt, windowed_model
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import zigzag_ext as zz
from zigzag_ext.hf import attention, compiled
from zigzag_ext.hf.cache_argument import cache_argument
from zigzag_ext.planning.native import whole_plan

WINDOW = 8
# Gates, interleaved RoPE, norms and layers without RoPE, a soft cap, learned sinks, queries scaled by position, mixed RoPE.
TRACED = ["afmoe", "cohere2", "exaone4", "gemma2", "gpt_oss", "ministral3", "smollm3"]


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", WINDOWED)
    if "traced_family" in metafunc.fixturenames:
        metafunc.parametrize("traced_family", WINDOWED if metafunc.config.getoption("--long") else TRACED)


@pytest.fixture
def model(family):
    return windowed_model(family, WINDOW)


def test_one_shot_and_every_chunking(model):
    assert set(zz.native_windows(model.config)) - {None} == {WINDOW}
    ids = prompt(61, batch=2)
    with torch.no_grad():
        with stock(model):
            expected = model(ids).logits
        with zz.zigzag(model):
            assert close(model(ids, use_cache=False).logits, expected)
            for chunk in (61, 23, 5):
                given = cache_argument(model, zz.ZigzagCache(model.config))
                parts = [model(part, **given).logits for part in ids.split(chunk, 1)]
                assert close(torch.cat(parts, 1), expected), f"chunks of {chunk}"


@pytest.mark.parametrize("plan_of", [lambda model: None, streaming_plan], ids=["as_it_is", "streaming"])
def test_padded_batch_over_five_windows_of_decoding(model, plan_of):
    plan, batch = plan_of(model), padded_prompt([30, 17, 3])
    with zz.zigzag(model, plan):
        answer, logits = logits_of(model, 5 * WINDOW + 3, **batch)
    kinds = (plan or whole_plan(zz.native_windows(model.config))).kinds
    for reference in (stock(model), dense_oracle(model, kinds, 2, 5)) if plan is None else (dense_oracle(model, kinds, 2, 5),):
        with reference:
            assert close(logits, next_logits(model, answer, **batch))


def test_beams(model):
    batch = padded_prompt([20, 11])
    with stock(model):
        expected = generate(model, 2 * WINDOW, num_beams=3, **batch)
    with zz.zigzag(model):
        assert generate(model, 2 * WINDOW, num_beams=3, **batch).equal(expected)


@pytest.mark.parametrize("batch", [padded_prompt([30]), padded_prompt([30, 17, 3])], ids=["one_row", "padded"])
def test_traced_steps(traced_family, batch, monkeypatch):
    monkeypatch.setattr(compiled._Backend, "__call__", traced_only)
    model = windowed_model(traced_family, WINDOW)
    plan = streaming_plan(model)
    with zz.zigzag(model, plan, compile=True):
        answer, logits = logits_of(model, 3 * WINDOW, **batch)
    with dense_oracle(model, plan.kinds, 2, 5):
        assert close(logits, next_logits(model, answer, **batch))


def test_compiled_steps():
    """Two tables of cosines and sines, norms of queries and keys, a scale of its own."""
    model = windowed_model("gemma3_text", WINDOW, num_hidden_layers=2)
    batch = padded_prompt([30, 17])
    with zz.zigzag(model, compile=True):
        answer, logits = logits_of(model, 5 * WINDOW, **batch)
    with stock(model):
        assert close(logits, next_logits(model, answer, **batch))


def test_native_layers_are_rings_and_are_reported():
    model = windowed_model("gemma3_text", WINDOW)
    cache = zz.ZigzagCache(model.config, rollback=3)
    with zz.zigzag(model), torch.no_grad():
        model(prompt(61), **cache_argument(model, cache))
    assert [layer.slots for layer in cache.layers] == [11, 256, 11, 256]
    token = 2 * 2 * 64 * 4  # keys and values of two heads in float32
    assert cache.kv_bytes() == (2 * 11 + 2 * 61) * token
    assert "native     2 layers" in cache.memory_report() and "streaming" not in cache.memory_report()
    assert not cache.is_croppable or cache.rollback


def test_a_plan_must_name_the_windows_of_the_model():
    model = windowed_model("gemma3_text", WINDOW)
    for plan, words in [
        (zz.Plan(["retrieval"] * 2, sink=2, window=5), "the plan has 2 layers, the model has 4, of which 1 3 are full-attention"),
        (zz.Plan(["streaming"] * 4, sink=0, window=WINDOW), "layer 0 has a native window of 8 in the model, full attention in"),
    ]:
        for make in (lambda plan=plan: zz.enable(model, plan), lambda plan=plan: zz.ZigzagCache(model.config, plan)):
            with pytest.raises(ValueError, match=words):
                make()
    assert model.config._attn_implementation == "sdpa"


def test_a_config_that_does_not_say_what_the_model_does():
    model = new_model("llama")
    model.config.sliding_window = WINDOW
    with pytest.raises(ValueError, match="llama .*names a sliding window of 8 tokens, and its code makes no such mask"):
        zz.enable(model)
    model = windowed_model("mistral", WINDOW, sliding_window=None)
    cache = zz.ZigzagCache(model.config)
    with zz.zigzag(model), torch.no_grad():
        model.config.sliding_window = WINDOW
        with pytest.raises(ValueError, match="layer 0, asks for a sliding window of 8 tokens, its config says full causal"):
            model(prompt(20), **cache_argument(model, cache))
    model = windowed_model("mistral", WINDOW)
    plan = zz.Plan(["retrieval"] * 4, sink=2, window=5)
    with pytest.raises(ValueError, match="layer 0 has a native window of 8 in the model"):
        zz.enable(model, plan)
    with zz.zigzag(model), torch.no_grad():
        model.config.sliding_window = WINDOW + 1
        with pytest.raises(ValueError, match="layer 0 has a native window of 9 in the model"):
            model(prompt(20))


@pytest.mark.parametrize(
    "function, window",
    [
        (sliding_window_causal_mask_function(5), 5),
        (causal_mask_function, 0),
        (chunked_causal_mask_function(5, torch.zeros(1)), 0),
        (sliding_window_bidirectional_mask_function(5), 0),
        (or_masks(sliding_window_causal_mask_function(5), causal_mask_function), 0),
        (or_masks(sliding_window_overlay(5), causal_mask_function), 0),
        (lambda *indices: True, 0),
        (None, 0),
    ],
)
def test_masks_that_are_sliding_windows(function, window):
    assert attention.window_of(function) == window


def test_masks_of_eager_code_are_looked_into_while_another_thread_compiles(monkeypatch):
    """torch's flag is one for all threads."""
    windows = sliding_window_causal_mask_function(5)
    expected = vars(attention.mask(mask_function=windows))
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert vars(attention.mask(mask_function=windows)) == expected and expected["window"] == 5
