"""What callers ask of an enabled model: losses, stop strings, other caches, weights; as of a stock one, or refused by name."""

import pytest
import torch
from tiny_models import NUM_LAYERS, VOCAB, generate, new_model, prompt
from transformers import GenerationConfig, PreTrainedTokenizerFast

import zigzag_ext as zz

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)
WHOLE = zz.Plan(["retrieval"] * NUM_LAYERS, sink=0, window=1)  # what it computes is what stock attention computes


def logits(model, ids=None, **options):
    with torch.no_grad():
        return model(prompt(40) if ids is None else ids, **options).logits


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


def test_classifier_free_guidance_keeps_a_cache_for_each_prompt():
    model, options = new_model("llama"), {"guidance_scale": 1.5, "negative_prompt_ids": prompt(8, seed=4)}
    expected = generate(model, 6, prompt(20), **options)
    assert generate(zz.enable(model, WHOLE), 6, prompt(20), **options).equal(expected)
