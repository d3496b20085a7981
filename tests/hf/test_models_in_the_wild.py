"""Models that are shared, wrapped, copied or saved work as stock ones do, or are refused by name before anything changes."""

import copy
import itertools
import pickle
import subprocess
import sys

import pytest
import torch
from tiny_models import NUM_LAYERS, VOCAB, generate, new_model, padded_prompt, prompt
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

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
    "generate_batch": (([[1, 2, 3]],), "left-padded batch"),
    "init_continuous_batching": ((), "left-padded batch"),
    "continuous_batching_context_manager": ((), "left-padded batch"),
    "set_attn_implementation": (("eager",), "disable"),
    "_replicate_for_data_parallel": ((), "device_map='auto'"),
}


@pytest.mark.parametrize("name", REFUSED_METHODS)
def test_a_method_that_is_not_served_is_refused_and_comes_back(name):
    arguments, words = REFUSED_METHODS[name]
    model = new_model("llama")
    if not hasattr(model, name):
        pytest.fail(f"this transformers has no {name}()") if name != "continuous_batching_context_manager" else None
        return
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


@pytest.mark.parametrize("chunk", ["auto", 8, None])
@pytest.mark.parametrize("options", ["labels", "shift_labels", "sum_of_items", "left_padded"])
def test_losses(options, chunk):
    """Perplexity over windows as evaluation loops compute it."""
    model, ids = new_model("llama"), prompt(40)
    labels = ids.clone()
    labels[:, :9] = -100
    arguments = {"labels": labels}
    if options == "shift_labels":
        arguments["shift_labels"] = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    elif options == "sum_of_items":
        arguments |= {"num_items_in_batch": torch.tensor(31), "ignore_index": -100}
    elif options == "left_padded":
        arguments["attention_mask"] = (labels != -100).long()
    with torch.no_grad():
        expected = model(ids, **arguments)
        zz.enable(model, WHOLE, prefill_chunk=chunk)
        found = model(ids, **arguments)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-5)


def test_a_perplexity_loop_over_one_cache():
    model, ids, losses = zz.enable(new_model("llama"), PLAN), prompt(41), []
    whole = logits(model, ids)[:, :-1]
    expected = torch.nn.functional.cross_entropy(whole[0], ids[0, 1:], reduction="none")
    cache = zz.ZigzagCache(model.config, PLAN)
    for start, end in ((0, 20), (20, 21), (21, 40)):
        with torch.no_grad():
            shifted = ids[:, start + 1 : end + 1]
            losses.append(model(ids[:, start:end], labels=shifted, shift_labels=shifted, past_key_values=cache).loss)
        torch.testing.assert_close(losses[-1], expected[start:end].mean(), atol=1e-4, rtol=1e-4)


def letters() -> PreTrainedTokenizerFast:
    """One letter a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:VOCAB]
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("beams", [1, 2])
def test_stop_strings(beams):
    model, tokenizer, ids = new_model("llama"), letters(), prompt(20) % 94
    ascii_only = {"num_beams": beams, "suppress_tokens": list(range(94, VOCAB))}
    whole = generate(model, 12, ids, **ascii_only)
    options = ascii_only | {"stop_strings": [tokenizer.decode(whole[0, 4:6])], "tokenizer": tokenizer}
    expected = generate(model, 12, ids, **options)
    assert beams > 1 or expected.shape[1] == 6  # beams stop when all of them have
    zz.enable(model, WHOLE)
    assert generate(model, 12, ids, **options).equal(expected)
    with pytest.raises(ValueError, match="tokenizer"):
        generate(model, 12, ids, stop_strings=["a"])


@pytest.mark.parametrize("where", ["argument", "config", "model", "model_behind_config"])
@pytest.mark.parametrize("kind", ["offloaded", "static", "quantized", "dynamic", "offloaded_static"])
def test_another_cache_implementation_is_refused(kind, where):
    model, options = new_model("llama"), {}
    cache = zz.ZigzagCache(model.config, PLAN)
    if where == "argument":
        options["cache_implementation"] = kind
    elif where == "config":
        options["generation_config"] = GenerationConfig(cache_implementation=kind)
    else:
        model.generation_config.cache_implementation = kind
        options |= {"generation_config": GenerationConfig()} if where == "model_behind_config" else {}
    zz.enable(model, PLAN)
    for own in ({}, {"past_key_values": cache}):
        with pytest.raises(ValueError, match=f"does not serve cache_implementation='{kind}': leave it None"):
            generate(model, 3, prompt(20), **options, **own)
    assert cache.get_seq_length() == 0


def test_attention_weights_are_refused_wherever_they_are_asked_for():
    model, cache = zz.enable(new_model("llama"), PLAN), zz.ZigzagCache(new_model("llama").config, PLAN)
    words = "output_attentions=True: .*disable.*eager"
    with torch.no_grad():
        with pytest.raises(ValueError, match=words):
            model(prompt(5), output_attentions=True, past_key_values=cache)
        for options in ({"output_attentions": True}, {"generation_config": GenerationConfig(output_attentions=True)}):
            with pytest.raises(ValueError, match=words):
                generate(model, 3, prompt(5), return_dict_in_generate=True, past_key_values=cache, **options)
        zz.disable(model).set_attn_implementation("eager")
        model.config.output_attentions = True
        zz.enable(model, PLAN)
        with pytest.raises(ValueError, match=words):
            model(prompt(5), past_key_values=cache)
        assert model(prompt(5), output_attentions=False).logits.shape == (1, 5, VOCAB)
    assert cache.get_seq_length() == 0


BAD_TOKENS = {
    "one_dimension": ({"input_ids": prompt(5)[0]}, ValueError, r"input_ids must be \[batch, tokens\], got \[5\]"),
    "three_dimensions": ({"input_ids": prompt(5)[None]}, ValueError, r"input_ids must be .* got \[1, 1, 5\]"),
    "embeddings": ({"inputs_embeds": torch.zeros(5, 256)}, ValueError, r"inputs_embeds must be .*hidden size\], got \[5, 256\]"),
    "list": ({"input_ids": [[1, 2]]}, TypeError, "input_ids must be a tensor .* got a list"),
    "none": ({}, ValueError, "must specify exactly one of input_ids or inputs_embeds"),
    "both": ({"input_ids": prompt(5), "inputs_embeds": torch.zeros(1, 5, 256)}, ValueError, "must specify exactly one of"),
}


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_tokens_of_another_form(case):
    arguments, error, words = BAD_TOKENS[case]
    model, cache = zz.enable(new_model("llama"), PLAN), zz.ZigzagCache(new_model("llama").config, PLAN)
    with torch.no_grad(), pytest.raises(error, match=words):
        model(**arguments, past_key_values=cache)
    if set(arguments) == {"input_ids"}:
        for given in ((arguments["input_ids"],), ()):
            with pytest.raises(error, match=words):
                model.generate(*given, **({} if given else arguments), max_new_tokens=2)
    assert cache.get_seq_length() == 0


def test_embeddings_alone_and_no_cache_as_stock():
    model, ids = new_model("llama"), prompt(30, 2)
    embeddings = model.get_input_embeddings()(ids).detach()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(inputs_embeds=embeddings, **options)
    stock, none = logits(model, ids), model(ids, use_cache=False)
    zz.enable(model, WHOLE)
    for use_cache in (True, False):
        assert model.generate(inputs_embeds=embeddings, use_cache=use_cache, **options).equal(expected)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs_embeds=embeddings).logits, stock, atol=1e-4, rtol=1e-4)
        output = model(ids, use_cache=False)
    assert output.keys() == none.keys() and output.past_key_values is None
    torch.testing.assert_close(output.logits, stock, atol=1e-4, rtol=1e-4)


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


def test_classifier_free_guidance_keeps_a_cache_for_each_prompt():
    model, options = new_model("llama"), {"guidance_scale": 1.5, "negative_prompt_ids": prompt(8, seed=4)}
    expected = generate(model, 6, prompt(20), **options)
    assert generate(zz.enable(model, WHOLE), 6, prompt(20), **options).equal(expected)
