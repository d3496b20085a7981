"""Image-text models: the plan is over the layers of the text decoder, and what images bring is the model's own.

Compared with stock eager attention in float32. Where a model lets the tokens of one image see each other, text is served.
"""

import copy

import pytest
import torch
from dense_oracle import dense_oracle
from image_models import FAMILIES, MROPE, image_model, image_prompt, new_image_model
from tiny_models import prompt
from transformers import AutoModelForCausalLM, DynamicCache

import zigzag_ext as zz
from zigzag_ext.hf import compiled, session
from zigzag_ext.hf.cache_argument import cache_argument
from zigzag_ext.hf.images import brings_images
from zigzag_ext.hf.own_config import text_decoder
from zigzag_ext.study.probe import probe
from zigzag_ext.study.torch_attention import causal

NEW = 40
CAUSAL = [family for family in FAMILIES if family != "gemma3"]


def logits_of(model, batch: dict, tokens: int = NEW, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens and the logits they were chosen from."""
    options |= {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    output = model.generate(**batch, max_new_tokens=tokens, **options)
    return output.sequences[:, batch["input_ids"].shape[1] :], torch.stack(output.logits, 1)


def stock_logits(model, batch: dict, tokens: int = NEW) -> tuple[torch.Tensor, torch.Tensor]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    found = logits_of(model, batch, tokens)
    model.set_attn_implementation(before)
    return found


def same(got, expected) -> bool:
    return got[0].equal(expected[0]) and torch.allclose(got[1], expected[1], rtol=1e-4, atol=1e-4)


def streaming_plan(model) -> zz.Plan:
    """Every other full layer streams, the first one too."""
    windows = zz.native_windows(model.config)
    kinds = ["retrieval" if place % 2 else "streaming" for place in range(windows.count(None))]
    return zz.Plan(kinds, sink=2, window=5).with_native(windows)


@pytest.mark.parametrize("family", FAMILIES)
def test_text_equals_stock_eager_and_dense_masks(family):
    model, batch = image_model(family), image_prompt(family, 0, padding=(0, 9))
    expected = stock_logits(model, batch)
    with zz.zigzag(model):
        assert same(logits_of(model, batch), expected)
    plan = streaming_plan(model)
    with dense_oracle(text_decoder(model), plan.kinds, 2, 5):
        expected = logits_of(model, batch, 20)
    with zz.zigzag(model, plan):
        assert same(logits_of(model, batch, 20), expected)


@pytest.mark.parametrize("family", CAUSAL)
def test_images_equal_stock_eager_and_dense_masks(family):
    model = image_model(family)
    batches = [image_prompt(family, images, padding=(0, 9)) for images in (1, 2)]
    expected = [stock_logits(model, batch) for batch in batches]
    with zz.zigzag(model):
        for batch, each in zip(batches, expected, strict=True):
            assert same(logits_of(model, batch), each)
        other = image_prompt(family, 2, padding=(0, 9), seed=2) | {"input_ids": batches[1]["input_ids"]}
        assert not same(logits_of(model, other, 1), (expected[1][0][:, :1], expected[1][1][:, :1])), "images change nothing"
    plan = streaming_plan(model)
    with dense_oracle(text_decoder(model), plan.kinds, 2, 5):
        expected = logits_of(model, batches[0], 20)
    with zz.zigzag(model, plan):
        assert same(logits_of(model, batches[0], 20), expected)


def test_images_whose_tokens_see_each_other_are_refused():
    model, text = new_image_model("gemma3"), image_prompt("gemma3", 0)
    image = image_prompt("gemma3", 1, length=90)
    with zz.zigzag(model, prefill_chunk=16), torch.no_grad():
        cache = zz.ZigzagCache(model.config)
        kept = cache_argument(model, cache)
        with pytest.raises(ValueError, match="Gemma3Attention needs the attention mask .*causal_mask_function.*one image"):
            model.generate(**image, **kept, max_new_tokens=2)
        assert cache.get_seq_length() == 0
        model(**text, **kept)
        del image["attention_mask"]
        with pytest.raises(ValueError, match="no tokens that see later ones, as those of one image"):
            model(**image, **kept, logits_to_keep=1)
        assert cache.get_seq_length() == 60
        expected = model(torch.cat([text["input_ids"], prompt(20)], 1)).logits[:, 60:]
        assert torch.allclose(model(prompt(20), **kept).logits, expected, atol=1e-4)
        no_types = {name: value for name, value in text.items() if name != "token_type_ids"}
        assert same(logits_of(model, text, 3), logits_of(model, no_types, 3))


@pytest.mark.skipif("gemma4" not in FAMILIES, reason="this transformers has no Gemma 4")
def test_images_that_only_some_models_of_a_family_refuse():
    model = new_image_model("gemma4", use_bidirectional_attention="vision")
    batch = image_prompt("gemma4", 0)
    expected = stock_logits(model, batch, 3)
    with zz.zigzag(model):
        assert same(logits_of(model, batch, 3), expected)
        with pytest.raises(ValueError, match="Gemma4TextAttention needs the attention mask .*one image"):
            model.generate(**image_prompt("gemma4", 1), max_new_tokens=2)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_prompts_in_pieces(family, monkeypatch):
    model, pieces, cut = image_model(family), [], session.pieces_of
    monkeypatch.setattr(session, "pieces_of", lambda *args: pieces.append(cut(*args)) or pieces[-1])
    for images, count in ((0, 8), (1, 1)):
        batch = image_prompt(family, images, padding=(0, 9))
        expected = stock_logits(model, batch, 5)
        with zz.zigzag(model, prefill_chunk=8):
            assert same(logits_of(model, batch, 5), expected)
        assert len(pieces[0]) == count
        pieces.clear()


def test_what_counts_as_images():
    pixels, ids = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)
    assert brings_images({"input_ids": ids, "pixel_values": [[pixels]]})
    assert brings_images({"input_ids": ids, "mm_encoder_outputs": {"image": {"pooler_output": (pixels,)}}})
    assert not brings_images({"inputs_embeds": pixels, "attention_mask": pixels, "image_grid_thw": ids, "use_cache": True})


def second_turn(model, batch: dict, cache: dict):
    """A generator: the first turn of a conversation, then the second one, without the images, whose logits it gives."""
    ids = torch.cat([batch["input_ids"], logits_of(model, batch, 5, **cache)[0], prompt(9, seed=5)], 1)
    yield
    yield logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 5, **cache)


@pytest.mark.parametrize("family", MROPE)
def test_conversations_that_take_turns(family):
    """Each on a cache of its own; the positions behind its images are its own, too. Then one without images."""
    model, expected = image_model(family), []
    prompts = [image_prompt(family, images, seed=seed) for images, seed in ((1, 1), (2, 2), (0, 3))]
    model.set_attn_implementation("eager")
    for batch in prompts:
        expected.append(list(second_turn(model, batch, cache_argument(model, DynamicCache(config=model.config))))[1])
    model.set_attn_implementation("sdpa")
    with zz.zigzag(model):
        caches = [cache_argument(model, zz.ZigzagCache(model.config, max_len=200)) for _ in prompts]
        turns = [second_turn(model, batch, cache) for batch, cache in zip(prompts, caches, strict=True)]
        for turn in turns:
            next(turn)
        for turn, each in zip(turns, expected, strict=True):
            assert same(next(turn), each)


def stock_follow(model, batch: dict, follow: torch.Tensor) -> torch.Tensor:
    """Logits of tokens behind a prompt, of a model that has read nothing before."""
    model.model.rope_deltas = None
    with torch.no_grad():
        cache = cache_argument(model, DynamicCache(config=model.config))
        model(**batch, **cache)
        return model(follow, **cache).logits


@pytest.mark.parametrize("family", MROPE)
def test_forwards_without_positions(family):
    """The model's own positions, of a prompt and of what follows it, on caches that take turns; no mask."""
    model = image_model(family)
    prompts = [image_prompt(family, images, seed=seed) for images, seed in ((2, 2), (0, 3))]
    for batch in prompts:
        del batch["attention_mask"]
    follow = prompt(6, seed=5)

    expected = [stock_follow(model, batch, follow) for batch in prompts]
    with zz.zigzag(model), torch.no_grad():
        caches = [cache_argument(model, zz.ZigzagCache(model.config)) for _ in prompts]
        for batch, cache in zip(prompts, caches, strict=True):
            model(**batch, **cache)
        for cache, each in zip(caches, expected, strict=True):
            assert torch.allclose(model(follow, **cache).logits, each, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava"])
def test_a_cache_with_images_is_not_known_by_its_ids(family, tmp_path):
    model, batch, other = image_model(family), image_prompt(family, 1), image_prompt(family, 1, seed=2)
    other["input_ids"] = batch["input_ids"]  # another image, the same ids
    expected = stock_logits(model, other, 5)
    with zz.zigzag(model, streaming_plan(model), rollback=40):
        cache = zz.ZigzagCache(model.config, rollback=80)
        kept = cache_argument(model, cache)
        first = logits_of(model, batch, 5, **kept)
        held = cache.get_seq_length()
        with pytest.raises(ValueError, match=f"holds {held} tokens and the call brings images, which token ids do not tell"):
            model.generate(**other, **kept, max_new_tokens=5)
        changed = {name: batch[name].clone() for name in ("input_ids", "attention_mask")}
        with_question = {name: value.clone() for name, value in changed.items()}
        changed["input_ids"][:, 40] += 1
        with pytest.raises(ValueError, match="prompt with images of 60 tokens, and the call begins with the first 40 of"):
            model.generate(**changed, **kept, max_new_tokens=5)
        with pytest.raises(ValueError, match="has read images.*cannot be saved"):
            cache.save(tmp_path / "no.cache")
        assert cache.get_seq_length() == held
        assert same(logits_of(model, with_question, 5, **kept), first), "the same question once more, its image is held"
        cache.reset()
        assert same(logits_of(model, other, 5, **kept), expected)
        cache.reset()
        model.generate(**changed, **kept, max_new_tokens=5)
        cache.save(tmp_path / "text.cache")


def test_beams_behind_an_image():
    model, batch = image_model("qwen3_vl"), image_prompt("qwen3_vl", 1, padding=(0, 9))
    options = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    model.set_attn_implementation("eager")
    expected = model.generate(**batch, **options)
    model.set_attn_implementation("sdpa")
    with zz.zigzag(model):
        assert model.generate(**batch, **options).equal(expected)


def test_positions_that_do_not_rise_within_an_image():
    model, ids = image_model("qwen2_5_vl"), prompt(20)
    positions = torch.arange(20).expand(3, 1, 20).clone()
    positions[1, :, 5:11], positions[2, :, 5:11] = torch.tensor([5, 5, 5, 6, 6, 6]), torch.tensor([5, 6, 7] * 2)
    positions[:, :, 11:] -= 3
    text = torch.arange(20)[None, None]
    given = {"input_ids": ids, "position_ids": torch.cat([text, positions])}
    with torch.no_grad():
        expected = model(**given).logits
        with zz.zigzag(model):
            assert torch.allclose(model(**given).logits, expected, atol=1e-4)
            assert torch.allclose(model(ids, position_ids=positions).logits, expected, atol=1e-4)
            cache = cache_argument(model, zz.ZigzagCache(model.config))
            model(ids[:, :15], position_ids=positions[..., :15], **cache)
            rest = model(ids[:, 15:], position_ids=positions[..., 15:], **cache).logits
            assert torch.allclose(rest, expected[:, 15:], atol=1e-4), "positions below the number of tokens held"
            packed = torch.cat([text % 10, positions])
            with pytest.raises(ValueError, match="position_ids go back within a row"):
                model(ids, position_ids=packed)


def test_traced_steps(monkeypatch):
    monkeypatch.setattr(compiled._Backend, "__call__", traced_only)
    two = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    model, twin, batch = *(new_image_model("gemma3", **two) for _ in range(2)), image_prompt("gemma3", 0, padding=(0, 9))
    plan = streaming_plan(model)
    with dense_oracle(text_decoder(twin), plan.kinds, 2, 5):
        expected = logits_of(twin, batch, 20)
    with zz.zigzag(model, plan, compile=True):
        assert same(logits_of(model, batch, 20), expected)


def traced_only(self, module, inputs):
    """What a compiled step does before the compiler of kernels."""
    compiled.fuse_rope(module.graph)
    module.recompile()
    return module.forward


def test_compiled_steps():
    model, batch = new_image_model("qwen3_vl", num_hidden_layers=1), image_prompt("qwen3_vl", 1, padding=(0, 9))
    expected = stock_logits(model, batch)
    with zz.zigzag(model, compile=True):
        assert same(logits_of(model, batch), expected)


def test_other_parts_keep_their_attention():
    model = new_image_model("llava")
    shared, vision = model.config, model.config.vision_config
    model.set_attn_implementation({"vision_config": "eager"})
    zz.enable(model)
    assert model.config is not shared and model.config.text_config is text_decoder(model).config
    assert model.config.vision_config is model.model.vision_tower.config
    names = [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]
    assert names == ["sdpa", "zigzag", "eager"]
    assert [c._attn_implementation for c in (shared, shared.text_config, vision)] == ["sdpa", "sdpa", "eager"]
    twin, batch = copy.deepcopy(model), image_prompt("llava", 1)
    assert same(logits_of(twin, batch, 3), logits_of(model, batch, 3))
    assert copy.deepcopy(model.config).text_config._attn_implementation == "sdpa"
    zz.disable(model)
    names = [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]
    assert names == ["sdpa", "sdpa", "eager"]


def test_the_text_decoder_alone():
    """As AutoModelForCausalLM makes it from the text config, with the weights and the plan of the whole model."""
    model, batch = image_model("gemma3"), image_prompt("gemma3", 0)
    del batch["token_type_ids"]
    alone = AutoModelForCausalLM.from_config(model.config.text_config, dtype=torch.float32).eval()
    alone.model.load_state_dict(text_decoder(model).state_dict())
    alone.lm_head.load_state_dict(model.lm_head.state_dict())
    plan = streaming_plan(model)
    with zz.zigzag(model, plan), zz.zigzag(alone, plan):
        assert same(logits_of(alone, batch), logits_of(model, batch))


def test_speculation_and_scores_of_a_text_decoder():
    model, batch = image_model("qwen2_5_vl"), image_prompt("qwen2_5_vl", 0, padding=(0, 9))
    image, text = image_prompt("qwen2_5_vl", 1), {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected, _ = stock_logits(model, text)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with zz.zigzag(model):
        for draft in ("lookup", "streaming"):
            found = model.generate(**text, **options, custom_generate=zz.speculate(draft=draft))
            assert found[:, 60:].equal(expected)
        with pytest.raises(ValueError, match="speculate does not serve the argument"):
            model.generate(**image, **options, custom_generate=zz.speculate())
    ids = text["input_ids"][:1]
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with probe(model, lambda layer, *given: causal(*given)):
            assert torch.allclose(model(ids, use_cache=False).logits, plain, atol=1e-4)
    assert model.config.text_config._attn_implementation == model.config._attn_implementation == "sdpa"
