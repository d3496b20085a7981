"""Taking tokens back: `crop`, and the assisted decoding of transformers that needs it."""

import pytest
import torch
from tiny_models import generate, new_model, padded_prompt, prompt, tiny_model

import zigzag_ext as zz

SINK, WINDOW = 4, 16
KINDS = ["streaming", "retrieval"] * 2
PLAN = zz.Plan(KINDS, sink=SINK, window=WINDOW)
HEADS = zz.Plan([("retrieval", "streaming"), "streaming", "retrieval", "streaming"], sink=SINK, window=WINDOW)
FORMATS = zz.Plan(KINDS, sink=SINK, window=WINDOW, kv_format="int8", ring_kv_format="fp8", key_smoothing=True)
FAMILIES = ["llama", "qwen2", "gemma", "phi3", "gpt_neox"]


@pytest.fixture(scope="module")
def model():
    with zz.zigzag(tiny_model(), PLAN) as model, torch.no_grad():
        yield model


@pytest.mark.parametrize("plan", [PLAN, HEADS, FORMATS], ids=["plain", "heads", "formats"])
@pytest.mark.parametrize("held", [3, SINK + WINDOW - 1, SINK + WINDOW, 61])
def test_a_cache_that_took_tokens_back_is_one_that_never_had_them(model, plan, held):
    """Rounds of drafts of which some stay, at every wrap; rows of ragged length."""
    lengths = [held, max(1, held - 2)]
    batch = padded_prompt(lengths)
    cache = zz.ZigzagCache(model.config, plan, rollback=5)
    fresh = zz.ZigzagCache(model.config, plan, rollback=5)
    mask = batch["attention_mask"]
    for each in (cache, fresh):
        model(**batch, past_key_values=each)
    for turn in range(12):
        keep = turn % 6
        draft = prompt(6, 2, seed=turn)
        more = torch.cat([mask, torch.ones(2, 6, dtype=mask.dtype)], 1)
        model(draft, attention_mask=more, past_key_values=cache)
        cache.crop(-(5 - keep))
        mask = more[:, : more.shape[1] - (5 - keep)]
        model(draft[:, : keep + 1], attention_mask=mask, past_key_values=fresh)
        assert cache.seq_lens.equal(fresh.seq_lens) and cache.get_seq_length() == fresh.get_seq_length()
    step, mask = prompt(1, 2, seed=99), torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
    found, expected = (model(step, attention_mask=mask, past_key_values=each).logits for each in (cache, fresh))
    tolerance = 1e-5 if plan is not FORMATS else 5e-2
    torch.testing.assert_close(found, expected, atol=tolerance * 10, rtol=tolerance)


def test_crop_counts_as_transformers_does(model):
    cache = zz.ZigzagCache(model.config, PLAN, rollback=8)
    model(prompt(50), past_key_values=cache)
    cache.crop(0)
    cache.crop(70)
    assert cache.get_seq_length() == 50
    cache.crop(-3)
    assert cache.get_seq_length() == 47
    cache.crop(44)
    assert cache.get_seq_length() == 44 and cache.seq_lens.tolist() == [44]


def test_more_than_the_slack_is_refused_before_anything_changes(model):
    cache = zz.ZigzagCache(model.config, PLAN, rollback=8)
    model(prompt(50), past_key_values=cache)
    cache.crop(-5)
    with pytest.raises(
        RuntimeError, match=r"crop\(-4\) takes 4 tokens back; the rings of layers \[0, 2\] can take back 3 .rollback=8"
    ):
        cache.crop(-4)
    assert cache.get_seq_length() == 45
    cache.crop(-3)
    with pytest.raises(RuntimeError, match="more than the 42 tokens"):
        cache.crop(-43)
    assert cache.is_croppable and not zz.ZigzagCache(model.config, PLAN).is_croppable


def test_rings_that_were_never_full_take_back_anything(model):
    cache = zz.ZigzagCache(model.config, PLAN)
    model(prompt(SINK + WINDOW), past_key_values=cache)
    cache.crop(3)
    expected = model(prompt(20)[:, :5], past_key_values=zz.ZigzagCache(model.config, PLAN)).logits[:, -1]
    torch.testing.assert_close(model(prompt(20)[:, 3:5], past_key_values=cache).logits[:, -1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own_cache", [True, False])
@pytest.mark.parametrize("method", ["prompt_lookup", "assistant"])
@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_decoding_gives_the_tokens_of_plain_decoding(family, method, own_cache):
    model, ids = new_model(family), prompt(6).repeat(1, 8)
    assistant = new_model(family, num_hidden_layers=2)
    options = {"prompt_lookup_num_tokens": 5} if method == "prompt_lookup" else {"assistant_model": assistant}
    options["eos_token_id"] = 10**6  # of no vocabulary; lookups of transformers 5.4 fail without one
    with zz.zigzag(model, PLAN, rollback=20):
        expected = generate(model, 60, ids)
        if own_cache:
            options["past_key_values"] = zz.ZigzagCache(model.config, PLAN, rollback=20)
        assert generate(model, 60, ids, **options).equal(expected)


def test_an_enabled_assistant(model):
    assistant = new_model("llama", num_hidden_layers=2)
    ids = prompt(30)
    with zz.zigzag(new_model("llama"), PLAN, rollback=20) as target:
        expected = generate(target, 40, ids)
        with zz.zigzag(assistant, zz.Plan(KINDS[:2], sink=SINK, window=WINDOW), rollback=40):
            assert generate(target, 40, ids, assistant_model=assistant).equal(expected)


@pytest.mark.parametrize("method", ["prompt_lookup", "assistant"])
@pytest.mark.parametrize("own_cache", [True, False])
def test_rings_without_slack_say_what_to_do(model, method, own_cache):
    ids = prompt(6).repeat(1, 4)
    options = {"prompt_lookup_num_tokens": 3} if method == "prompt_lookup" else {"assistant_model": new_model("llama")}
    if own_cache:
        options["past_key_values"] = zz.ZigzagCache(model.config, PLAN)
    needed = "rollback=20|a larger rollback|requires a cache that can be cropped"
    with pytest.raises((RuntimeError, ValueError), match=needed):  # the second where 5.4 crops, the third is what 5.24 says
        generate(model, 40, ids, eos_token_id=2, **options)


def test_a_short_forward_reads_no_device_value(model):
    """2 to 16 tokens on a cache that holds some wait for nothing. On a CPU only the mask's check does."""
    cache = zz.ZigzagCache(model.config, PLAN, rollback=8)
    model(prompt(40), past_key_values=cache)
    with torch.profiler.profile() as profile:
        model(prompt(5), past_key_values=cache)
    assert not [event for event in profile.events() if event.name in ("aten::_local_scalar_dense", "aten::item")]
