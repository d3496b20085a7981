"""One mechanism for every tested transformers: the cache is found by what it is, and an error says where it is not."""

import functools
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import generate, new_model, prompt, tiny_model
from transformers import DynamicCache
from transformers.cache_utils import Cache

import zigzag_ext as zz
from zigzag_ext.hf import cache_argument
from zigzag_ext.hf.cache_argument import TESTED, cache_parameter, split_cache

ROOT = Path(__file__).parents[2]
PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)
FAMILIES = ["llama", "gpt2", "gpt_neox", "opt", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_forwards_take_the_cache_by_either_name(family, name):
    model, ids = tiny_model(family), prompt(40)
    cache = zz.ZigzagCache(model.config, PLAN)
    with zz.zigzag(model, PLAN), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model(ids).logits[:, 30:]
        outputs = [model(piece, **{name: cache}) for piece in ids.split([30, 5, 1, 4], 1)]
    assert cache.get_seq_length() == 40
    torch.testing.assert_close(torch.cat([output.logits for output in outputs[1:]], 1), expected, atol=1e-4, rtol=1e-4)
    for output in outputs:
        assert [value for value in output.values() if isinstance(value, Cache)] == [cache]
        assert output.past_key_values is cache


def test_generate_takes_every_name_that_transformers_has():
    model, ids = tiny_model(), prompt(30)
    names = {cache_parameter(model), "past_key_values"}
    with zz.zigzag(model, PLAN):
        expected = generate(model, 8, ids)
        for name in names:
            cache = zz.ZigzagCache(model.config, PLAN)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # transformers' own, about the name that the caller chose
                output = model.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True, **{name: cache})
            assert output.sequences[:, 30:].equal(expected)
            assert cache.get_seq_length() == 37 and any(value is cache for value in output.values())


def test_a_forward_takes_one_cache():
    model, ids = tiny_model(), prompt(5)
    one, other = (zz.ZigzagCache(model.config, PLAN) for _ in range(2))
    with zz.zigzag(model, PLAN), torch.no_grad():
        with pytest.raises(ValueError, match="one cache, cache and past_key_values are different ones"):
            model(ids, cache=one, past_key_values=other)
        assert not one.get_seq_length() and not other.get_seq_length()
        model(ids, cache=one, past_key_values=one)
        model(ids, cache=None, past_key_values=one)
        assert one.get_seq_length() == 10
        with pytest.raises(TypeError, match="got a tuple"):
            model(ids, past_key_values=((torch.zeros(1),),))


def test_a_cache_is_found_under_any_name():
    cache = DynamicCache()
    assert split_cache({"input_ids": 1, "state": cache, "cache": None}) == (cache, {"input_ids": 1})
    assert split_cache({"input_ids": 1, "past_key_values": None}) == (None, {"input_ids": 1})

    class Renamed(torch.nn.Module):
        def forward(self, input_ids, memory: Cache | None = None, cache: dict | None = None):
            pass

    assert cache_parameter(Renamed()) == "memory"


def drop_caches(module):
    """Makes a module lose the cache that it is given, as one that hands it down under another name would."""
    forward = module.forward

    @functools.wraps(forward)
    def without(*args, **kwargs):
        return forward(*args, **split_cache(kwargs)[1])

    module.forward = without


@pytest.mark.parametrize("part", ["model", "layers"])
def test_a_cache_that_does_not_reach_the_layers_is_an_error_of_the_first_forward(part):
    model, ids = new_model("llama"), prompt(5)
    for module in [model.model] if part == "model" else model.model.layers:
        drop_caches(module)
    words = (
        f"LlamaAttention, layer 0, .*transformers {re.escape(transformers.__version__)} is installed.* {TESTED[0]} to {TESTED[1]}"
    )
    cache = zz.ZigzagCache(model.config, PLAN)
    with zz.zigzag(model, PLAN), torch.no_grad():
        with pytest.raises(RuntimeError, match=words):
            generate(model, 3, ids)
        with pytest.raises(RuntimeError, match=words):
            model(ids, cache=cache)
        assert cache.get_seq_length() == 0
        model(ids, use_cache=False)  # needs none


def test_a_forward_without_a_parameter_for_a_cache_is_refused():
    model = new_model("llama")
    forward = model.forward
    model.forward = lambda input_ids, **kwargs: forward(input_ids, **kwargs)
    with pytest.raises(RuntimeError, match=rf"LlamaForCausalLM.forward\(\) has no parameter for a KV cache.*{TESTED[1]}"):
        zz.enable(model, PLAN)
    assert model.config._attn_implementation != "zigzag"


@pytest.mark.parametrize("version,warned", [("5.4.0", 0), ("5.24.3", 0), ("5.25.0.dev0", 1), ("6.0", 1)])
def test_a_newer_transformers_is_warned_of_once(monkeypatch, version, warned):
    model = tiny_model()
    monkeypatch.setattr(cache_argument.transformers, "__version__", version)
    cache_argument.warn_if_untested.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            zz.disable(zz.enable(model, PLAN))
    messages = [str(warning.message) for warning in found]
    assert len(messages) == warned, messages
    assert all(f"{version} is installed" in message and "5.4 to 5.24" in message for message in messages)
    assert {Path(warning.filename).name for warning in found} <= {Path(__file__).name}, found
    cache_argument.warn_if_untested.cache_clear()


def test_the_declared_range_is_what_is_tested():
    pins = [(ROOT / f"constraints-{end}.txt").read_text() for end in ("lower", "upper")]
    pinned = tuple(re.search(r"^transformers==(\d+\.\d+)", text, re.MULTILINE)[1] for text in pins)
    major, minor = TESTED[1].split(".")
    declared = set(re.findall(r'"transformers([<>=][^"]*)"', (ROOT / "pyproject.toml").read_text()))
    assert pinned == TESTED and declared == {f">={TESTED[0]},<{major}.{int(minor) + 1}"}


def test_a_plan_of_the_gallery_on_its_geometry():
    """No renamed argument is met on the way: transformers warns of those."""
    model = new_model("llama", num_hidden_layers=32, num_attention_heads=8, num_key_value_heads=8, head_dim=128)
    plan = zz.load_plan("meta-llama/Llama-3.1-8B-Instruct", retrieval_ratio=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        zz.enable(model, plan, max_len=8192)
        cache = zz.ZigzagCache(model.config, plan, max_len=8192)
        answer = generate(model, 20, prompt(400), **{cache_parameter(model): cache})
    assert answer.shape == (1, 20) and cache.get_seq_length() == 419 and len(plan.streaming_layers) == 16
