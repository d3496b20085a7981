"""A forward commits, or leaves the cache as it was, or says so: a failure of any module; copies; other conversations."""

import copy
import gc
import weakref

import pytest
import torch
from tiny_models import SHARED, generate, new_model, padded_prompt, prompt, shared_model, tiny_model

import zigzag_ext as zz
from zigzag_ext.cache import states
from zigzag_ext.cache.state import CacheState
from zigzag_ext.hf.cache_argument import split_cache

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)
PLANS = {"rings": PLAN, "retrieval": zz.Plan(["retrieval"] * 4, sink=0, window=1)}
HELD, NEW = 30, 20  # rings are full before the new tokens come


@pytest.fixture(scope="module")
def model():
    with zz.zigzag(new_model("llama"), PLAN, prefill_chunk=8) as model, torch.no_grad():
        yield model


def filled(model, plan=PLAN, tokens=HELD, **options):
    cache = zz.ZigzagCache(model.config, plan, **options)
    if tokens:
        model(prompt(tokens), past_key_values=cache)
    return cache


def next_logits(model, cache):
    return model(prompt(1, cache.state.batch or 1, seed=9), past_key_values=cache).logits


def long_forward(model, cache):
    return model(prompt(NEW, seed=3), past_key_values=cache, logits_to_keep=1)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "site", ["model.embed_tokens", "model.layers.0", "model.layers.2.self_attn.o_proj", "model.norm", "lm_head"]
)
@pytest.mark.parametrize("held", [0, HELD])
@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_failure_of_any_module(model, site, error, held, nth):
    """In the first pass of a prompt in chunks and in later ones. An empty cache, or one without rings, is as it was."""

    def fail(*args):
        calls.append(site)
        if len(calls) == nth:
            raise error("somewhere")

    for plan in PLANS.values():
        cache, calls = filled(model, plan, held), []
        hook = model.get_submodule(site).register_forward_pre_hook(fail)
        try:
            long_forward(model, cache)
        except error:
            pass
        finally:
            hook.remove()
        if len(calls) < nth:
            continue  # the head runs once
        before = filled(model, plan, held)
        if not held or plan is not PLAN or (nth == 1 and site in ("model.embed_tokens", "model.layers.0")):
            assert cache.get_seq_length() == held
            assert long_forward(model, cache).logits.equal(long_forward(model, before).logits)
        else:
            with pytest.raises(RuntimeError, match=r"overwritten older ones in the rings of layers .*call reset\(\)"):
                long_forward(model, cache)
            cache.reset()
            assert model(prompt(HELD), past_key_values=cache).logits.equal(
                model(prompt(HELD), past_key_values=filled(model, plan, 0)).logits
            )


def test_rings_with_room_for_the_new_tokens_are_as_they_were(model):
    cache, before = filled(model, rollback=NEW), filled(model, rollback=NEW)
    hook = model.model.norm.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        long_forward(model, cache)
    hook.remove()
    assert cache.get_seq_length() == HELD
    assert long_forward(model, cache).logits.equal(long_forward(model, before).logits)


def test_an_interrupt_right_before_the_lengths_advance(model, monkeypatch):
    def interrupted(state, name, value):
        if name == "changing" and value and "lengths advanced" in value:
            raise KeyboardInterrupt
        object.__setattr__(state, name, value)

    cache = filled(model, rollback=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CacheState, "__setattr__", interrupted, raising=False)
        model(prompt(1, seed=2), past_key_values=cache)
    cache.state.check()
    assert cache.state.tokens.columns == cache.state.columns == HELD
    torch.testing.assert_close(next_logits(model, cache), next_logits(model, filled(model)), atol=1e-5, rtol=1e-5)


def test_models_that_call_each_other(model):
    """A module of an enabled model runs another enabled model."""
    inner, expected = new_model("qwen3"), model(prompt(12)).logits
    with zz.zigzag(inner, PLAN):
        alone = inner(prompt(7)).logits
        hook = model.model.layers[1].register_forward_pre_hook(lambda *args: found.append(inner(prompt(7)).logits))
        found = []
        assert model(prompt(12)).logits.equal(expected)
        hook.remove()
        assert found and all(logits.equal(alone) for logits in found)


def test_a_copy_of_an_enabled_model_is_enabled_and_on_its_own():
    for compile in (False, True):
        model = new_model("llama", num_hidden_layers=2)
        zz.enable(model, zz.Plan(["streaming", "retrieval"], sink=4, window=16), compile=compile)
        expected = generate(model, 4, prompt(20))
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.lm_head.weight.neg_()
        changed = generate(other, 4, prompt(20))
        assert generate(model, 4, prompt(20)).equal(expected) and not changed.equal(expected)
        zz.disable(other)
        stock = copy.deepcopy(other)
        assert "forward" not in vars(other) and generate(stock, 4, prompt(20)).shape == expected.shape
        assert generate(model, 4, prompt(20)).equal(expected)


def test_early_exit_is_refused_before_anything_changes():
    with zz.zigzag(tiny_model(), PLAN) as model:
        with pytest.raises(ValueError, match="does not serve assistant_early_exit=2"):
            generate(model, 4, prompt(20), assistant_early_exit=2)
        assert model.config.num_hidden_layers == 4
        assert generate(model, 4, prompt(20)).shape == (1, 4)


def test_a_mask_that_hides_tokens_in_a_step_is_refused(model):
    cache, mask = filled(model), torch.ones(1, HELD + 1, dtype=torch.long)
    mask[0, 5:9] = 0
    with pytest.raises(ValueError, match="masks other tokens than those the cache left out"):
        model(prompt(1), attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(next_logits(model, cache), next_logits(model, filled(model)))


def test_a_cache_of_another_conversation():
    """A common prefix is kept; where rings cannot go back to it, the first differing position is named."""
    ids, other = prompt(82), torch.cat([prompt(82)[:, :40], prompt(54, seed=8)], 1)
    with zz.zigzag(tiny_model(), PLAN) as model:
        for plan, options in ((PLANS["retrieval"], {}), (PLAN, {"rollback": 60})):
            cache = zz.ZigzagCache(model.config, plan, **options)
            generate(model, 3, ids, past_key_values=cache)
            fresh = generate(model, 5, other, past_key_values=zz.ZigzagCache(model.config, plan))
            assert generate(model, 5, other, past_key_values=cache).equal(fresh)
        cache = zz.ZigzagCache(model.config, PLAN)
        generate(model, 3, ids, past_key_values=cache)
        with pytest.raises(ValueError, match=r"another token at position 40, .*call reset\(\)"):
            generate(model, 5, other, past_key_values=cache)
        longer = torch.cat([ids, generate(model, 3, ids), prompt(5, seed=4)], 1)
        fresh = generate(model, 5, longer, past_key_values=zz.ZigzagCache(model.config, PLAN))
        assert generate(model, 5, longer, past_key_values=cache).equal(fresh)


def test_the_same_call_again():
    """A notebook cell that is run twice."""
    batch = padded_prompt([40, 31])
    with zz.zigzag(tiny_model(), PLAN) as model:
        cache = zz.ZigzagCache(model.config, PLANS["retrieval"])
        first = generate(model, 8, **batch, past_key_values=cache)
        assert generate(model, 8, **batch, past_key_values=cache).equal(first)
        cache = zz.ZigzagCache(model.config, PLAN)
        generate(model, 8, **batch, past_key_values=cache)
        with pytest.raises(ValueError, match=r"8 tokens beyond those given.*call reset\(\)"):
            generate(model, 8, **batch, past_key_values=cache)
        cache.reset()
        assert generate(model, 8, **batch, past_key_values=cache).shape == first.shape


def test_a_cache_of_another_conversation_under_beams():
    with zz.zigzag(tiny_model(), PLAN) as model:
        for plan in PLANS.values():
            cache = zz.ZigzagCache(model.config, plan)
            generate(model, 6, prompt(60), num_beams=2, past_key_values=cache)
            other = torch.cat([prompt(30), prompt(40, seed=5)], 1)
            if plan is PLAN:
                with pytest.raises(ValueError, match=r"another token at position 30, .*call reset\(\)"):
                    generate(model, 6, other, num_beams=2, past_key_values=cache)
            else:
                fresh = generate(model, 6, other, num_beams=2, past_key_values=zz.ZigzagCache(model.config, plan))
                assert generate(model, 6, other, num_beams=2, past_key_values=cache).equal(fresh)


FREED = ["llama", *(["lfm2"] if states.SERVED else []), *SHARED]


@pytest.mark.parametrize("family", FREED)
def test_a_cache_goes_with_its_last_reference(family):
    """Its memory must not wait for a collection of cycles."""
    model = shared_model(family, 8) if family in SHARED else new_model(family)
    with zz.zigzag(model), torch.no_grad():
        cache, _ = split_cache(dict(model(**padded_prompt([20, 9]))))
        model(prompt(1, 2), past_key_values=cache)
        with pytest.raises(IndexError):
            model(prompt(3, 2), past_key_values=cache, logits_to_keep=torch.tensor([3]))
        gone = weakref.ref(cache)
        gc.collect()
        gc.disable()
        try:
            del cache
            assert gone() is None
        finally:
            gc.enable()


def test_a_kept_cache_does_not_keep_its_model():
    model = new_model("llama", num_hidden_layers=2)
    zz.enable(model, zz.Plan(["streaming", "retrieval"], sink=4, window=16), compile=True)
    cache = zz.ZigzagCache(model.config, zz.Plan(["streaming", "retrieval"], sink=4, window=16))
    generate(model, 3, prompt(5), past_key_values=cache)
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None and cache.get_seq_length() == 7


def test_no_row_is_refused_and_changes_nothing(model):
    cache = filled(model)
    with pytest.raises(ValueError, match="needs at least one row"):
        cache.batch_select_indices(torch.tensor([], dtype=torch.long))
    torch.testing.assert_close(next_logits(model, cache), next_logits(model, filled(model)))


def test_gradients_are_warned_about_once():
    model = new_model("llama")
    with zz.zigzag(model, PLAN), torch.enable_grad():
        with pytest.warns(UserWarning, match="no gradients are recorded") as warned:
            assert not model(prompt(5)).logits.requires_grad
            model(prompt(5))
        assert len([w for w in warned if "no gradients" in str(w.message)]) == 1
