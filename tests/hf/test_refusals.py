"""What cannot be computed exactly raises by name, before anything is written; nothing is silently ignored."""

import copy
import inspect
import warnings

import pytest
import torch
from tiny_models import NUM_LAYERS, generate, new_model, padded_prompt, prompt, tiny_model
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import zigzag_ext as zz
from zigzag_ext.cache import states

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)
_MLA = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}

# family, what is changed in its config, words of the error
REFUSED = {
    "chunked": ("llama4_text", {"layer_types": ["chunked_attention"] * 4}, "llama4_text .*layer 0 is 'chunked_attention'"),
    "latent": ("deepseek_v3", _MLA | {"first_k_dense_replace": 4}, "deepseek_v3 .*latent attention"),
    "head_dim": ("llama", {"head_dim": 32}, "llama .*head_dim is 32; supported: 64, 80, 96, 128, 192, 256, 512"),
    "group_size": ("llama", {"num_attention_heads": 32, "num_key_value_heads": 1}, "llama .*32 query heads share 1 KV heads"),
    "no_heads": ("rwkv", {"num_attention_heads": None}, "rwkv .*config.num_attention_heads is None"),
    "encoder": ("bert", {}, "bert .*is not causal"),
    "encoder_decoder_half": ("bart", {"decoder_layers": 4, "d_model": 256, "decoder_attention_heads": 4}, "bart .*is not causal"),
    "not_functional": ("bloom", {"n_layer": NUM_LAYERS, "n_head": 4}, "bloom .*AttentionInterface"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_family_raises_by_name_and_is_left_alone(case):
    family, overrides, words = REFUSED[case]
    model = new_model(family, **overrides)
    before = model.config._attn_implementation
    with pytest.raises((ValueError, RuntimeError), match=words):
        zz.enable(model, PLAN)
    assert model.config._attn_implementation == before
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_encoder_decoder_raises():
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=64, d_ff=64, num_layers=1, num_heads=1))
    with pytest.raises(ValueError, match="t5 .*encoder-decoder"):
        zz.enable(model, PLAN)


def test_a_composite_model_raises_for_its_text_decoder():
    vision = CLIPVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1)
    text = new_model("llama", head_dim=32).config
    model = AutoModelForImageTextToText.from_config(LlavaConfig(vision_config=vision, text_config=text))
    before = model.config
    with pytest.raises(ValueError, match="llava .*head_dim is 32; supported"):
        zz.enable(model, PLAN)
    assert model.config is before and text._attn_implementation == "sdpa"
    model.model.language_model.config = copy.deepcopy(text)
    with pytest.raises(ValueError, match="llava .*text decoder of this composite model is no model of its own"):
        zz.enable(model, PLAN)


def test_shared_kv_caches_that_the_code_does_not_have_raise():
    model = new_model("llama")
    model.config.num_kv_shared_layers = 2
    with pytest.raises(ValueError, match=r"llama .*by its config layers \[2, 3\] read .* of others, by its code layers \[\]"):
        zz.enable(model, PLAN)
    with pytest.raises(ValueError, match="the plan has 4 layers, the model has 2"):
        zz.ZigzagCache(model.config, PLAN)
    for shared in (4, -1, "2"):
        model.config.num_kv_shared_layers = shared
        with pytest.raises(ValueError, match="num_kv_shared_layers must be less than the 4 layers"):
            zz.ZigzagCache(model.config)


def test_states_need_transformers_that_hold_them(monkeypatch):
    monkeypatch.setattr(states, "SERVED", False)
    model = new_model("lfm2")
    for make in (lambda: zz.enable(model), lambda: zz.ZigzagCache(model.config)):
        with pytest.raises(ValueError, match="lfm2.*: its layers with recurrent or convolution states need transformers 5.14 or"):
            make()


def test_a_layer_that_never_attends_raises():
    model = new_model("llama")
    model.model.layers[2].self_attn.forward = lambda hidden_states, **kwargs: (hidden_states, None)
    with zz.zigzag(model, PLAN), torch.no_grad(), pytest.raises(RuntimeError, match=r"layers \[2\] never called"):
        model(prompt(5))


def test_an_unsupported_dtype_raises():
    with pytest.raises(ValueError, match="llama .*dtype is float64; supported: float16, bfloat16, and float32 on the CPU"):
        zz.enable(new_model("llama").double(), PLAN)


def test_arguments_of_the_wrong_type():
    model = tiny_model()
    for wrong in ("plan.json", list(PLAN.kinds), 4):
        with pytest.raises(TypeError, match="plan must be a zigzag_ext.Plan .*got"):
            zz.enable(model, wrong)
    for wrong in (True, 8.0, "8"):
        with pytest.raises(TypeError, match="max_len must be an integer number of tokens"):
            zz.enable(model, PLAN, max_len=wrong)
    for wrong in (0, -1, 2**31):
        with pytest.raises(ValueError, match=f"max_len must be at least 1 token and at most 2\\^30, .*got {wrong}"):
            zz.enable(model, PLAN, max_len=wrong)
    for wrong, name in ((torch.nn.Linear(2, 2), "Linear"), ("llama", "str"), (PLAN, "Plan")):
        with pytest.raises(TypeError, match=f"model must be a transformers language model .*got a {name}"):
            zz.enable(wrong, PLAN)
    assert not model._forward_hooks and model.config._attn_implementation == "sdpa"


def test_options_are_keyword_only_and_prompts_are_cut_by_default():
    parameters = list(inspect.signature(zz.enable).parameters.values())
    assert [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY] == ["model", "plan"]
    assert inspect.signature(zz.enable).parameters["prefill_chunk"].default == "auto"
    with pytest.raises(TypeError, match="positional arguments"):
        zz.enable(tiny_model(), PLAN, 100)


def test_arguments_of_a_call_as_python_checks_them():
    model, ids = tiny_model(), prompt(5)
    with zz.zigzag(model, PLAN), torch.no_grad():
        with pytest.raises(TypeError, match="LlamaForCausalLM.forward.. got multiple values for argument 'input_ids'"):
            model(ids, input_ids=ids)
        with pytest.raises(TypeError, match="positional arguments but 40 were given"):
            model(*[ids] * 40)
        with pytest.raises(ValueError, match="without input_ids and without inputs_embeds"):
            model()


def test_an_interrupted_forward_leaves_no_cache_behind(monkeypatch):
    model = new_model("llama")

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with zz.zigzag(model, PLAN), torch.no_grad():
        hook = model.model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt(5))
        hook.remove()
        monkeypatch.setattr(zz.ZigzagCache, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(prompt(5))
        with pytest.raises(RuntimeError, match="without a zigzag cache"):
            model.model(prompt(5))


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 4}], ids=["same_prompt", "chunked_prefill"])
def test_a_used_cache_needs_the_whole_conversation(options):
    """In chunks that start with the first token; a forward that brings new tokens only is one that goes on."""
    model, ids, cache = tiny_model(), prompt(12), zz.ZigzagCache(tiny_model().config, PLAN)
    with zz.zigzag(model, PLAN):
        first = generate(model, 3, ids, past_key_values=cache)
        if options:
            with pytest.raises(ValueError, match=r"already holds 14 tokens; pass the whole conversation, or reset\(\)"):
                generate(model, 3, ids, past_key_values=cache, **options)
            cache.reset()
        assert generate(model, 3, ids, past_key_values=cache, **options).equal(first)


def test_layer_counts_must_agree():
    model, short = tiny_model(), zz.Plan(["retrieval"] * 3, sink=4, window=16)
    with pytest.raises(ValueError, match="the plan has 3 layers, the model has 4"):
        zz.enable(model, short)
    with pytest.raises(ValueError, match="the plan has 3 layers, the model has 4"):
        zz.ZigzagCache(model.config, short)


def test_enable_and_disable_come_in_pairs():
    model = tiny_model()
    with pytest.raises(RuntimeError, match="not enabled"):
        zz.disable(model)
    with zz.zigzag(model, PLAN), pytest.raises(RuntimeError, match="already enabled"):
        zz.enable(model, PLAN)


def test_a_zigzag_cache_on_a_model_that_is_not_enabled():
    model = tiny_model()
    with pytest.raises(RuntimeError, match="call zigzag_ext.enable"):
        generate(model, 2, prompt(5), past_key_values=zz.ZigzagCache(model.config, PLAN))


def test_the_implementation_name_without_enable():
    model = new_model("llama")
    model.set_attn_implementation("zigzag")
    with torch.no_grad(), pytest.raises(RuntimeError, match="without a zigzag cache"):
        model(prompt(5))


def test_a_part_of_an_enabled_model():
    model = tiny_model()
    with zz.zigzag(model, PLAN), torch.no_grad(), pytest.raises(RuntimeError, match="without a zigzag cache"):
        model.model(prompt(5))


BAD_CALLS = {
    "short_mask": ({"attention_mask": torch.ones(1, 4)}, ValueError, r"\[1, 5\]"),
    "four_dimensional_mask": ({"attention_mask": torch.zeros(1, 1, 5, 5)}, ValueError, r"attention_mask must be"),
    "weights": ({"output_attentions": True}, ValueError, "does not serve output_attentions"),
    "packed_positions": ({"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "use_cache": False}, ValueError, "several documents"),
    "packed_lengths": ({"cu_seq_lens_q": torch.tensor([0, 3, 5])}, ValueError, "cu_seq_lens_q"),
    "unknown_term": ({"position_bias": torch.zeros(1)}, ValueError, "position_bias"),
    "static_cache": ({"past_key_values": "static"}, TypeError, "got a StaticCache"),
    "dynamic_cache": (
        {"past_key_values": "dynamic"},
        TypeError,
        "got a DynamicCache: pass (cache|past_key_values)=zz.ZigzagCache",
    ),
    "filled_dynamic_cache": (
        {"past_key_values": "filled"},
        TypeError,
        "got a DynamicCache: pass (cache|past_key_values)=zz.ZigzagCache",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call_raises_and_the_model_works_on(case):
    options, error, words = BAD_CALLS[case]
    model, ids = tiny_model(), prompt(5)
    if options.get("past_key_values") == "static":
        options = {"past_key_values": StaticCache(config=model.config, max_cache_len=16)}
    elif options.get("past_key_values") == "dynamic":
        options = {"past_key_values": DynamicCache(config=model.config)}
    elif options.get("past_key_values") == "filled":
        filled = DynamicCache(config=model.config)
        for layer in range(NUM_LAYERS):
            filled.update(torch.zeros(1, 2, 2, 64), torch.zeros(1, 2, 2, 64), layer)
        options = {"past_key_values": filled}
    with zz.zigzag(model, PLAN), torch.no_grad():
        good = model(ids).logits
        with pytest.raises(error, match=words):
            model(ids, **options)
        assert model(ids).logits.equal(good)


def test_attention_dropout_and_gradients():
    model = new_model("llama", attention_dropout=0.1)
    with zz.zigzag(model, PLAN):
        with pytest.warns(UserWarning, match="no gradients are recorded"):
            assert not model(prompt(5)).logits.requires_grad
        with warnings.catch_warnings():  # once
            warnings.simplefilter("error")
            assert not model(prompt(5)).logits.requires_grad
        with torch.no_grad(), pytest.raises(ValueError, match="dropout 0.1"):
            model.train()(prompt(5))


def test_a_mask_that_contradicts_the_cache():
    model, cache = tiny_model(), zz.ZigzagCache(tiny_model().config, PLAN)
    batch = padded_prompt([6, 4])
    with zz.zigzag(model, PLAN), torch.no_grad():
        model(**batch, past_key_values=cache)
        with pytest.raises(ValueError, match="masks other tokens"):
            model(prompt(3, 2), attention_mask=torch.ones(2, 9), past_key_values=cache)
        with pytest.raises(ValueError, match="holds 2 rows, the input has 1"):
            model(prompt(3), past_key_values=cache)


def test_a_forward_that_failed_half_way_makes_the_cache_unusable_until_reset():
    model = new_model("llama")
    cache, ids = zz.ZigzagCache(model.config, PLAN), prompt(30)

    def fail(*args):
        raise MemoryError("in the third layer")

    with zz.zigzag(model, PLAN), torch.no_grad():
        good = model(ids, past_key_values=cache).logits
        hook = model.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(prompt(20), past_key_values=cache)
        hook.remove()
        with pytest.raises(RuntimeError, match=r"overwritten older ones in the rings of layers \[0, 2\].*call reset"):
            model(prompt(20), past_key_values=cache)
        cache.reset()
        assert model(ids, past_key_values=cache).logits.equal(good)
