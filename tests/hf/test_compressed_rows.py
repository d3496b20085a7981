"""Compressed prompts of rows that are padded, grow apart, or are chosen: what they hold is counted row by row."""

import numpy as np
import pytest
import torch
from tiny_models import new_model, prompt, windowed_model

import zigzag_ext as zz
from zigzag_ext.hf.session import session_of

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)
METHOD = zz.PromptWindows(budget=60, window=4, observe=8)
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def model():
    with zz.zigzag(new_model("llama"), PLAN) as model, torch.no_grad():
        yield model


def cache_of(model, method=METHOD, **options):
    return zz.ZigzagCache(model.config, PLAN, compress=method, **options)


def read(model, cache, ids, first, mask=None):
    """Logits of the last column; positions from `first` [batch] on, as many per row as it is given tokens."""
    new = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
    positions = torch.tensor(first)[:, None] + (new.cumsum(1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits


def test_rows_of_one_length_hold_what_each_has_left(model):
    """Prompts of 300 and 250 tokens keep 60 each; once both rows have 300 tokens, they hold 60 and 110."""
    ids, new = prompt(300, 2), prompt(20, 2, seed=4)
    method = zz.RecentOnly(budget=60, observe=8)
    both, alone = cache_of(model, method, rollback=50), cache_of(model, method, rollback=50)
    read(model, both, ids, [0, 0])
    both.crop([0, -50])
    read(model, alone, ids[1:, :250], [0])
    both.compress()
    alone.compress()
    own = prompt(50, seed=6)
    for start in range(0, 50, 10):
        piece, positions = own[:, start : start + 10], torch.arange(250 + start, 260 + start)[None]
        both_ids = torch.cat([torch.zeros_like(piece), piece])
        session_of(model).step(both, np.array([0, 10]), input_ids=both_ids, position_ids=positions.expand(2, -1))
        session_of(model).step(alone, np.array([10]), input_ids=piece, position_ids=positions)
    assert both.seq_lens.tolist() == [300, 300]
    with zz.prefill_options(backend="torch_cpu"):
        found = read(model, both, new, [300, 300])
    torch.testing.assert_close(found[1], read(model, alone, new[1:], [300])[0], **CLOSE)


def test_soft_caps_are_refused_before_the_model_is_changed():
    model = windowed_model("gemma2", 16)
    with pytest.raises(ValueError, match="gemma2: prompts of layers with soft-capped logits"):
        zz.enable(model, compress=METHOD)
    assert session_of(model) is None


def test_a_step_that_is_refused_has_not_ended_the_prompt(model):
    cache = cache_of(model)
    model(prompt(100), past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(prompt(1), attention_mask=torch.ones(1, 7), past_key_values=cache)
    assert not cache.compressed
    model(prompt(1), past_key_values=cache)
    assert cache.compressed
