"""Models with adapters of PEFT: enabled through the wrapper or behind it, before or after wrapping."""

import copy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tiny_models import NUM_LAYERS, generate, new_model, padded_prompt, prompt

import zigzag_ext as zz
from zigzag_ext.hf.cache_argument import cache_argument

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)
WHOLE = zz.Plan(["retrieval"] * NUM_LAYERS, sink=0, window=1)


def with_adapter(model, task=None):
    """LoRA with random weights, which change what the model says."""
    torch.manual_seed(7)
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type=task)
    return get_peft_model(model, config).eval()


def logits(model, ids=None, **options):
    with torch.no_grad():
        return model(input_ids=prompt(40) if ids is None else ids, **options).logits


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("order", ["wrapper", "base_before_wrapping", "base_after_wrapping", "wrapper_then_base_disabled"])
def test_an_adapter_is_served_active_off_and_merged(order, task):
    base = new_model("llama")
    if order == "base_before_wrapping":
        zz.enable(base, WHOLE)
    model = with_adapter(base, task)
    if order.startswith("wrapper"):
        assert zz.enable(model, WHOLE) is model
    elif order == "base_after_wrapping":
        zz.enable(base, WHOLE)
    stock, batch = with_adapter(new_model("llama"), task), padded_prompt([30, 11])

    def check():
        torch.testing.assert_close(logits(model), logits(stock), atol=2e-4, rtol=1e-4)
        expected = stock.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0).equal(expected)

    check()
    assert not logits(model).allclose(logits(new_model("llama")), atol=1e-2)
    with model.disable_adapter(), stock.disable_adapter():
        check()
    for each in (model, stock):
        each.merge_adapter()
    check()
    for each in (model, stock):
        each.unmerge_adapter()
    with pytest.raises(RuntimeError, match="already enabled"):
        zz.enable(model, PLAN)
    zz.disable(base if order == "wrapper_then_base_disabled" else model)
    assert base.config._attn_implementation == "sdpa" and logits(model).equal(logits(stock))
    with pytest.raises(RuntimeError, match="not enabled"):
        zz.disable(model)


def test_merging_and_unloading_keeps_the_model_enabled():
    model = zz.enable(with_adapter(new_model("llama")), PLAN)
    streamed = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), streamed, atol=2e-4, rtol=1e-4)
    cache = zz.ZigzagCache(merged.config, PLAN)
    generate(merged, 4, prompt(20), past_key_values=cache)
    assert cache.get_seq_length() == 23
    zz.disable(merged)


def test_a_cache_and_several_turns_through_the_wrapper():
    model = zz.enable(with_adapter(new_model("llama"), "CAUSAL_LM"), PLAN)
    cache, ids = zz.ZigzagCache(model.config, PLAN), prompt(30)
    for _ in range(2):
        fresh, kept = generate(model, 5, ids), cache_argument(model.get_base_model(), cache)
        assert model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0, **kept)[:, ids.shape[1] :].equal(fresh)
        ids = torch.cat([ids, fresh, prompt(4, seed=3)], 1)


def test_copies_and_configs_through_the_wrapper():
    model = zz.enable(with_adapter(new_model("llama")), PLAN)
    assert model.config is model.get_base_model().config
    other, streamed = copy.deepcopy(model), logits(model)
    zz.disable(model)
    assert logits(other).equal(streamed) and not logits(model).equal(streamed)


def test_adapters_with_keys_of_their_own_are_refused():
    model = get_peft_model(new_model("llama"), PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")).eval()
    with pytest.raises(ValueError, match="PREFIX_TUNING adapters keep keys of their own; use LoRA"):
        zz.enable(model, PLAN)
    assert model.config._attn_implementation == "sdpa"
