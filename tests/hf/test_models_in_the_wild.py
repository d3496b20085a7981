"""Models that are shared, wrapped, copied or saved work as stock ones do, or are refused by name before anything changes."""

import copy
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from tiny_models import NUM_LAYERS, generate, new_model, padded_prompt, prompt
from transformers import AutoModelForCausalLM, PreTrainedModel

import zigzag_ext as zz

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)
WHOLE = zz.Plan(["retrieval"] * NUM_LAYERS, sink=0, window=1)  # what it computes is what stock attention computes


def logits(model, ids=None, **options):
    with torch.no_grad():
        return model(prompt(40) if ids is None else ids, **options).logits


ORDERS = [
    order
    for order in itertools.permutations(["+a", "+b", "-a", "-b"])
    if all(order.index("+" + m) < order.index("-" + m) for m in "ab")
]


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_two_models_on_one_config(order):
    first = new_model("llama")
    models = {"a": first, "b": type(first)(first.config).eval()}
    stock = {name: logits(model) for name, model in models.items()}
    streamed = {name: logits(zz.enable(copy.deepcopy(model), PLAN)) for name, model in models.items()}
    shared, enabled = first.config, set()
    for action, name in order:
        enabled ^= {name}
        zz.enable(models[name], PLAN) if action == "+" else zz.disable(models[name])
        for each, model in models.items():
            assert logits(model).equal((streamed if each in enabled else stock)[each]), (order, name, each)
            assert all(module.config is model.config for module in model.modules() if hasattr(module, "config"))
        assert shared._attn_implementation == "sdpa"


def test_a_model_made_from_the_config_of_an_enabled_one():
    model = zz.enable(new_model("llama"), PLAN)
    made = AutoModelForCausalLM.from_config(copy.deepcopy(model.config)).eval()
    assert made.config._attn_implementation == "sdpa"
    logits(made)
    on_the_same = type(model)(model.config).eval()
    with pytest.raises(RuntimeError, match="made from the config of an enabled one needs a copy.deepcopy"):
        logits(on_the_same)
    before = logits(model)
    zz.disable(zz.enable(on_the_same, PLAN))
    assert on_the_same.config._attn_implementation == "sdpa" and logits(model).equal(before)
    logits(on_the_same)


def test_a_family_that_cannot_be_switched_keeps_its_config():
    model = new_model("bloom", n_layer=NUM_LAYERS, n_head=4)
    config = model.config
    with pytest.raises((ValueError, RuntimeError), match="AttentionInterface"):
        zz.enable(model, PLAN)
    assert model.config is config and model.transformer.config is config


def test_forward_called_directly():
    model = zz.enable(new_model("llama"), PLAN)
    expected, parameters = logits(model), dict(model.named_parameters())
    with torch.no_grad():
        assert model.forward(prompt(40)).logits.equal(expected)
        assert model.forward(input_ids=prompt(40)).logits.equal(expected)
        assert torch.func.functional_call(model, parameters, (prompt(40),)).logits.equal(expected)
        with pytest.raises(RuntimeError, match="without a zigzag cache: call the model that was given to"):
            type(model).forward(model, prompt(40))


LOADER = """
import sys, torch, pickle
sys.modules["zigzag_ext"] = None
torch.set_num_threads(1)
ids = torch.load("ids")
for name in ("torch", "model", "body"):
    load = pickle.load if name != "torch" else lambda file: torch.load(file, weights_only=False)
    model = load(open(name, "rb"))
    assert model.config._attn_implementation == "sdpa" and not {"forward", "generate", "__reduce_ex__"} & set(vars(model))
    with torch.no_grad():
        torch.save(model(ids)[0], name + ".out")
"""


def test_what_is_saved_is_a_stock_model(tmp_path):
    """It loads in a process that cannot import this package."""
    model = zz.enable(new_model("llama"), PLAN)
    enabled = logits(model)
    torch.save(model, tmp_path / "torch")
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    (tmp_path / "body").write_bytes(pickle.dumps(model.model))
    assert not any(b"zigzag" in file.read_bytes() for file in tmp_path.iterdir())
    assert logits(model).equal(enabled)
    zz.disable(model)
    torch.save(prompt(40), tmp_path / "ids")
    subprocess.run([sys.executable, "-c", LOADER], check=True, cwd=tmp_path)
    for name, part in {"torch": model, "model": model, "body": model.model}.items():
        with torch.no_grad():
            torch.testing.assert_close(torch.load(tmp_path / f"{name}.out"), part(prompt(40))[0])


def test_saved_files_and_state_dict_are_those_of_a_stock_model(tmp_path):
    model = new_model("llama")
    model.save_pretrained(tmp_path / "stock")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    zz.enable(model, PLAN).save_pretrained(tmp_path / "enabled")
    names = sorted(file.name for file in (tmp_path / "stock").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "enabled").iterdir())
    for name in names:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "enabled" / name).read_bytes()
    assert all(tensor.equal(state[name]) for name, tensor in model.state_dict().items()) and len(model.state_dict()) == len(state)
    model.load_state_dict(state)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "enabled").eval()
    assert logits(loaded).equal(logits(zz.disable(model)))


def test_copies_of_an_enabled_model_are_enabled_alone():
    model = zz.enable(new_model("llama"), PLAN)
    other, expected = copy.deepcopy(torch.nn.Sequential(model))[0], logits(model)
    zz.disable(model)
    assert logits(other).equal(expected) and generate(other, 4, prompt(30)).shape == (1, 4)
    again = pickle.loads(pickle.dumps(other))
    assert logits(again).equal(logits(model)) and not logits(model).equal(expected)
    assert logits(zz.enable(again, PLAN)).equal(expected)
    assert logits(zz.disable(other)).equal(logits(model))


REFUSED_METHODS = {
    "generate_batch": (([[1, 2, 3]],), "zz.Engine .* left-padded batch"),
    "init_continuous_batching": ((), "zz.Engine .* left-padded batch"),
    "continuous_batching_context_manager": ((), "zz.Engine .* left-padded batch"),
    "set_attn_implementation": (("eager",), "disable"),
    "_replicate_for_data_parallel": ((), "device_map='auto'"),
}


@pytest.mark.parametrize("name", [name for name in REFUSED_METHODS if hasattr(PreTrainedModel, name)])  # not all in the oldest
def test_a_method_that_is_not_served_is_refused_and_comes_back(name):
    arguments, words = REFUSED_METHODS[name]
    model = new_model("llama")
    before = set(vars(model))
    zz.enable(model, PLAN)
    expected = logits(model)
    with pytest.raises(RuntimeError, match=rf"does not serve {name}\(\): .*{words}"):
        getattr(model, name)(*arguments)
    assert model.config._attn_implementation == "zigzag" and logits(model).equal(expected)
    assert set(vars(zz.disable(model))) == before
    assert getattr(model, name).__func__ is getattr(type(model), name)


def wrap_forward(model, calls):
    """As accelerate's hooks do, and others."""
    inner = model.forward

    def forward(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = forward


@pytest.mark.parametrize("wrapped", ["before", "after", "accelerate"])
def test_a_wrapped_forward_survives_disable(wrapped):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, calls = new_model("llama"), []
    stock = logits(model)
    if wrapped == "before":
        wrap_forward(model, calls)
    zz.enable(model, PLAN)
    if wrapped == "after":
        wrap_forward(model, calls)
    elif wrapped == "accelerate":
        add_hook_to_module(model, ModelHook())
    streamed = logits(model)
    assert not streamed.equal(stock) and generate(model, 3, prompt(20)).shape == (1, 3)
    assert logits(zz.disable(model)).equal(stock)
    assert logits(zz.enable(model, PLAN)).equal(streamed)
    zz.disable(model)
    if wrapped == "accelerate":
        remove_hook_from_module(model)
    assert logits(model).equal(stock) and bool(calls) == (wrapped != "accelerate")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_over_a_float32_model(family, dtype):
    model, batch = new_model(family), padded_prompt([40, 12])

    def run(model):
        with torch.autocast("cpu", dtype):
            return logits(model, batch["input_ids"], attention_mask=batch["attention_mask"]), generate(model, 6, **batch)

    expected, tokens = run(model)
    zz.enable(model, WHOLE)
    found, again = run(model)
    real = batch["attention_mask"].bool()
    tolerance = {torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]  # a few roundings of logits of up to 8
    torch.testing.assert_close(found[real], expected[real], atol=tolerance, rtol=tolerance)
    assert found.dtype == expected.dtype and again.shape == tokens.shape
    cache = zz.ZigzagCache(model.config, PLAN)
    with torch.autocast("cpu", dtype):
        logits(model, past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    assert {layer.dtype for layer in cache.layers} == {dtype}
    for tokens in (1, 20):
        with pytest.raises(ValueError, match=f"layer 0 of the cache holds {str(dtype)[6:]} keys .* gives float32 .*reset"):
            logits(model, prompt(tokens), past_key_values=cache)
    assert cache.get_seq_length() == 40
    for layer, keys in zip(cache.layers, before, strict=True):
        assert layer.keys[:, :, :20].equal(keys[:, :, :20])  # slots behind what is held may hold anything
    cache.reset()
    assert logits(model, past_key_values=cache).dtype == torch.float32


@pytest.mark.parametrize("convert", ["bfloat16", "half"])
def test_a_model_that_changes_its_dtype(convert):
    model = zz.enable(new_model("llama"), PLAN)
    cache = zz.ZigzagCache(model.config, PLAN)
    generate(model, 3, prompt(20), past_key_values=cache)
    cache.reset()
    getattr(model, convert)()
    kept = generate(model, 6, prompt(20), past_key_values=cache)
    assert kept.equal(generate(model, 6, prompt(20))) and {layer.dtype for layer in cache.layers} == {model.dtype}


def test_gradient_checkpointing():
    model = new_model("llama")
    model.gradient_checkpointing_enable()
    zz.enable(model, PLAN)
    expected = logits(model)  # in eval mode it changes nothing
    with pytest.raises(ValueError, match=r"gradient checkpointing.*call model.eval\(\)"):
        logits(model.train())
    assert logits(model.eval()).equal(expected)


@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_model_behind_torch_compile(compiled_first):
    model = new_model("llama")
    stock = logits(model)
    compiled = torch.compile(model, backend="eager")
    if compiled_first:
        torch.testing.assert_close(logits(compiled), stock)
    assert zz.enable(compiled, PLAN) is compiled
    streamed = logits(model)
    assert not streamed.equal(stock) and logits(compiled).equal(streamed)
    assert generate(compiled, 4, prompt(20)).equal(generate(model, 4, prompt(20)))
    torch.testing.assert_close(logits(zz.disable(compiled)), stock)
    torch._dynamo.reset()
