"""Conversations that come as embeddings, to a cache that holds some of them, or others."""

import pytest
import torch
from tiny_models import generate, new_model, prompt

import zigzag_ext as zz
from zigzag_ext.cache import fingerprints as module
from zigzag_ext.cache.fingerprints import fingerprints
from zigzag_ext.cache.tokens import UNKNOWN

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)
WAYS = ["input_ids", "inputs_embeds"]


@pytest.fixture(scope="module")
def model():
    with zz.zigzag(new_model("llama"), PLAN, prefill_chunk=16) as model, torch.no_grad():
        yield model


def given(model, way, ids):
    return {way: ids if way == "input_ids" else model.get_input_embeddings()(ids).detach()}


def turn(model, cache, way, ids):
    """The new tokens of generate() on the whole conversation."""
    return model.generate(**given(model, way, ids), past_key_values=cache, max_new_tokens=3, do_sample=False, pad_token_id=0)[
        :, -3:
    ]


@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("first", WAYS)
@pytest.mark.parametrize("same", [0, 12, 33], ids="same_{}".format)
def test_a_turn_or_another_conversation(model, first, second, same):
    """What the cache holds of the conversation is kept, and nothing else."""
    cache = zz.ZigzagCache(model.config, PLAN, rollback=60)
    held = torch.cat([prompt(30, 2), turn(model, cache, first, prompt(30, 2))], 1)
    ids = torch.cat([held[:, :same], prompt(9, 2, seed=5)], 1)
    kept, keep = [], cache.state.remove
    cache.state.remove = lambda rows: kept.append(rows.columns) or keep(rows)
    found = turn(model, cache, second, ids)
    del cache.state.remove
    assert found.equal(generate(model, 3, ids)[:, -3:])
    assert kept == ([] if same in (0, 33) else [same]) and cache.get_seq_length() == same + 11


@pytest.mark.parametrize("second", WAYS)
@pytest.mark.parametrize("first", WAYS)
def test_rings_that_cannot_go_back_say_where_it_differs(model, first, second):
    cache = zz.ZigzagCache(model.config, PLAN)
    turn(model, cache, first, prompt(30))
    other = prompt(40)
    other[:, 7] += 1
    with pytest.raises(ValueError, match=r"another token at position 7.*call reset\(\)"):
        turn(model, cache, second, other)
    assert cache.get_seq_length() == 32


def test_embeddings_that_are_no_tokens_and_a_saved_cache(model, tmp_path):
    cache, soft = zz.ZigzagCache(model.config, PLAN), torch.randn(1, 30, model.config.hidden_size)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    new = model.generate(inputs_embeds=soft, past_key_values=cache, **options)[:, -3:]
    longer = torch.cat([soft, model.get_input_embeddings()(new), torch.randn(1, 4, model.config.hidden_size)], 1)
    cache.save(tmp_path / "cache")
    expected, other = (model.generate(inputs_embeds=each, **options) for each in (longer, -longer))
    for each in (zz.ZigzagCache.load(tmp_path / "cache", model), cache):
        assert model.generate(inputs_embeds=longer, past_key_values=each, **options).equal(expected)
        assert model.generate(inputs_embeds=-longer, past_key_values=each, **options).equal(other)


def test_embeddings_of_another_shape_are_refused(model):
    cache = zz.ZigzagCache(model.config, PLAN)
    with pytest.raises(ValueError, match=r"inputs_embeds must be \[batch, tokens, hidden size\], got \[5, 256\]"):
        model.generate(inputs_embeds=torch.zeros(5, 256), past_key_values=cache, max_new_tokens=2)


def test_fingerprints_tell_bits(dtype, device, monkeypatch):
    embeddings = torch.randn(3, 700, 64, device=device).to(dtype)
    embeddings[..., 3], embeddings[..., 5], embeddings[..., 9] = 1, 2, 3
    embeddings[2] = embeddings[0]
    found = fingerprints(embeddings)
    assert found.shape == (3, 700) and found.dtype == torch.int32 and (found < UNKNOWN).all()
    assert len(found[:2].unique()) == 1400 and found[2].equal(found[0])
    monkeypatch.setattr(module, "_AT_ONCE", 1000)
    assert fingerprints(embeddings).equal(found) and fingerprints(embeddings.transpose(0, 1)).T.equal(found)
    swapped, negated = embeddings.clone(), embeddings.clone()
    swapped[..., [3, 9]] = embeddings[..., [9, 3]]
    negated[..., 5].neg_()
    assert not ((fingerprints(swapped) == found) | (fingerprints(negated) == found)).any()
