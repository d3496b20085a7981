"""Scores, plans and tasks of models with sliding windows or recurrences of their own: they are about full-attention layers."""

import string

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, Gemma3TextConfig, Lfm2Config

import zigzag_ext as zz
from zigzag_ext.cache import states
from zigzag_ext.study.identify import METHODS

from .conftest import KV_HEADS

WINDOW, FULL = 48, (1, 3)
SMALL = {"sink": 4, "window": 32, "tokens": 1600, "prompts": 2}


@pytest.fixture(scope="module")
def hybrid():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=KV_HEADS,
        head_dim=64, vocab_size=len(string.printable), max_position_embeddings=3072, eos_token_id=None, bos_token_id=None,
        pad_token_id=0, initializer_range=0.3, tie_word_embeddings=False, sliding_window=WINDOW, sliding_window_pattern=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("method", METHODS)
def test_scores_have_a_row_per_full_layer(hybrid, tokenizer, method):
    options = {"tokens": 2400} if method == "gates" else {}
    scores = zz.identify(hybrid, tokenizer, method, **SMALL | options)
    assert scores.shape == (len(FULL), KV_HEADS) and scores.min() >= 0 and scores.max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_read_the_keys_of_others_have_no_rows(tokenizer, method):
    torch.manual_seed(0)
    config = Gemma3nTextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=KV_HEADS,
        head_dim=64, vocab_size=len(string.printable), max_position_embeddings=3072, eos_token_id=None, bos_token_id=None,
        pad_token_id=0, initializer_range=0.3, tie_word_embeddings=False, sliding_window=WINDOW, num_kv_shared_layers=2,
        layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"], hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=len(string.printable), laurel_rank=4, activation_sparsity_pattern=[0.0] * 5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    options = {"tokens": 2400} if method == "gates" else {}
    scores = zz.identify(model, tokenizer, method, **SMALL | {"prompts": 1} | options)
    assert scores.shape == (2, KV_HEADS) and scores.min() >= 0 and scores.max() <= 1
    plan = zz.solve(scores, retrieval_layers=1, sink=4, window=8, config=config)
    assert plan.native_windows == (None, WINDOW, None) and plan.origin["layers"] == 3
    zz.ZigzagCache(config, plan)


def test_from_scores_to_tokens(hybrid, tokenizer):
    scores = zz.identify(hybrid, tokenizer, "lazy", **SMALL)
    plan = zz.solve(scores, retrieval_layers=1, sink=4, window=8, config=hybrid.config)
    assert plan.native_windows == (WINDOW, None, WINDOW, None) and plan.retrieval_layers[0] in FULL
    assert plan.origin["layers"] == 4
    ids = torch.randint(1, 99, (1, 90), generator=torch.Generator().manual_seed(1))
    with zz.zigzag(hybrid, plan):
        cache = zz.ZigzagCache(hybrid.config, plan)
        tokens = hybrid.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert tokens.shape == (1, 110) and [layer.window for layer in cache.layers].count(WINDOW) == 2
    assert [layer.window for layer in cache.layers].count(8) == 1


def test_tasks_name_the_full_layers(hybrid, tokenizer):
    plan = zz.Plan(["retrieval", "streaming"], sink=4, window=8).with_native(zz.native_windows(hybrid.config))
    options = {"lengths": [400], "depths": [0.5], "prompts": 2}
    as_it_is, *_ = zz.evaluate.passkey(hybrid, tokenizer, **options)
    same, *_ = zz.evaluate.passkey(
        hybrid, tokenizer, zz.Plan(["retrieval"] * 2, sink=4, window=8).with_native(plan.native_windows), **options
    )
    streamed, *_ = zz.evaluate.passkey(hybrid, tokenizer, plan, **options)
    assert (as_it_is.kinds, same.kinds, streamed.kinds) == ("00", "00", "01")
    np.testing.assert_allclose(same.logprob, as_it_is.logprob, rtol=1e-4)
    assert abs(streamed.logprob - as_it_is.logprob) > 1e-3
    sized = zz.Plan(["streaming"] * 2, sink=4, window=8, layer_sizes=[(4, 9), None]).with_native(plan.native_windows)
    with pytest.raises(ValueError, match="a row of results names one sink and window"):
        zz.evaluate.passkey(hybrid, tokenizer, sized, **options)


@pytest.mark.skipif(not states.SERVED, reason=f"transformers {transformers.__version__} has no classes for states")
@pytest.mark.parametrize("method", ["lazy", "gates", "ablation"])
def test_layers_with_states_get_no_row_and_stay_as_they_are(tokenizer, method):
    torch.manual_seed(0)
    config = Lfm2Config(
        hidden_size=128, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=KV_HEADS,
        vocab_size=len(string.printable), max_position_embeddings=3072, eos_token_id=None, bos_token_id=None, pad_token_id=0,
        initializer_range=0.3, tie_word_embeddings=False, layer_types=["conv", "full_attention"] * 2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    scores = zz.identify(model, tokenizer, method, **SMALL | ({"tokens": 2400} if method == "gates" else {}))
    assert scores.shape == (len(FULL), KV_HEADS) and scores.min() >= 0 and scores.max() <= 1
    plan = zz.solve(scores, retrieval_layers=1, sink=4, window=8, config=config)
    assert plan.state_layers == (0, 2) and plan.retrieval_layers[0] in FULL and plan.origin["layers"] == 4
    as_it_is, *_ = zz.evaluate.passkey(model, tokenizer, lengths=[400], depths=[0.5], prompts=2)
    streamed, *_ = zz.evaluate.passkey(model, tokenizer, plan, lengths=[400], depths=[0.5], prompts=2)
    assert as_it_is.kinds == "00" and sorted(streamed.kinds) == ["0", "1"]
    assert abs(streamed.logprob - as_it_is.logprob) > 1e-3
