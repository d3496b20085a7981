"""Models with adapters of PEFT: enabled through the wrapper or behind it, before or after wrapping."""

import copy

import pytest
import torch
from gpu import needs_cuda
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tensor_parallel import captures_counted
from tiny_models import NUM_LAYERS, generate, new_model, padded_prompt, prompt

import zigzag_ext as zz
from zigzag_ext.hf.cache_argument import cache_argument
from zigzag_ext.hf.compiled import fingerprint

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


def with_two_adapters():
    model = with_adapter(new_model("llama"))
    model.add_adapter("other", LoraConfig(target_modules=["o_proj", "up_proj"], init_lora_weights=False))
    return model.eval()


def rescaled(model):
    model.base_model.model.model.layers[1].self_attn.q_proj.set_scale("default", 0.5)


SWITCHES = {
    "other": lambda model: model.set_adapter("other"),
    "back": lambda model: model.set_adapter("default"),
    "off": lambda model: model.base_model.disable_adapter_layers(),
    "on": lambda model: model.base_model.enable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "unmerged": lambda model: model.unmerge_adapter(),
    "rescaled": rescaled,
}


def test_every_switch_of_adapters_captures_again():
    """And nothing else does: what generate() leaves in a model is not taken for a switch."""
    model = with_two_adapters()
    with zz.zigzag(model, PLAN, compile=True, max_len=100), captures_counted(model.get_base_model(), "cpu") as counted:
        for turn, switch in enumerate([lambda model: None, *SWITCHES.values()]):
            switch(model)
            for _ in range(2):
                generate(model, 4, prompt(20))
            assert len(counted) == turn + 1


def forced_logits(model, ids) -> torch.Tensor:
    """[6, vocab]: of a prompt and of steps whose tokens are given, whatever the model says."""
    forced = prompt(6, seed=5)[0].tolist()
    how = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    following = lambda _, so_far: [forced[len(so_far) - ids.shape[1]]]  # noqa: E731
    return torch.cat(model.generate(ids, prefix_allowed_tokens_fn=following, **how).logits).float()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@needs_cuda
def test_a_captured_step_is_of_the_adapters_that_are_active():
    model, stock = (with_two_adapters().to("cuda", torch.bfloat16) for _ in range(2))
    stock.load_state_dict(model.state_dict())
    ids, before = prompt(30).cuda(), None
    with zz.zigzag(model, WHOLE, compile=True, max_len=100):
        for name, switch in {"before": lambda model: None, **SWITCHES}.items():
            switch(model)
            switch(stock)
            expected = forced_logits(stock, ids)
            assert distance(forced_logits(model, ids), expected) < 0.05, name
            if name in ("other", "back", "off", "on", "rescaled"):
                assert distance(before, expected) > 0.08, f"{name} changes nothing that could be seen"
            before = expected


@pytest.mark.parametrize("change", [
    lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.5),
    lambda layer: setattr(layer.self_attn, "scaling", 0.5),
    lambda layer: setattr(layer, "forward", lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)),
], ids=["epsilon", "scaling", "forward"])  # fmt: skip
def test_the_fingerprint_notices_what_is_set_in_a_module(change):
    model = new_model("llama")
    before = fingerprint(model)
    assert fingerprint(model) == before
    change(model.model.layers[2])
    assert fingerprint(model) != before


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
