"""Models whose last layers read the KV caches of earlier ones: exact without a plan, and under one that streams full layers.

Compared with stock eager attention on the model's own masks, in float32.
"""

import copy

import pytest
import torch
from dense_oracle import close, dense_oracle, logits_of, next_logits, stock, traced_only
from tiny_models import SHARED, generate, padded_prompt, prompt, shared_model

import zigzag_ext as zz
from zigzag_ext.hf import compiled
from zigzag_ext.hf.cache_argument import cache_argument
from zigzag_ext.hf.served import served
from zigzag_ext.planning.layers import Geometry, geometries, kv_sources

WINDOW, SOURCES = 8, (0, 1, 2, 3, 2, 3, 2, 3)
KINDS = ["sliding_attention", "full_attention"] * 4
PLANS = {"as_it_is": None, "shared_streams": ["retrieval", "streaming"], "shared_retrieves": ["streaming", "retrieval"]}
QUANTISED = {"kv_format": "int8", "ring_kv_format": "int8", "key_smoothing": True}


@pytest.fixture(params=SHARED)
def model(request):
    return shared_model(request.param, WINDOW)


@pytest.fixture
def gemma3n():
    return shared_model("gemma3n_text", WINDOW)


def plan_of(model, name: str) -> zz.Plan | None:
    return PLANS[name] and zz.Plan(PLANS[name], sink=2, window=5).with_native(zz.native_windows(model.config))


def meant(model, plan: zz.Plan | None):
    """The model with stock attention, under masks that say what the plan means in every layer."""
    return (
        stock(model) if plan is None else dense_oracle(model, [plan.kinds[source] for source in kv_sources(model.config)], 2, 5)
    )


def in_chunks(model, cache, ids, size: int) -> torch.Tensor:
    """Logits of a prompt that comes in forwards of `size` tokens."""
    with torch.no_grad():
        return torch.cat([model(part, **cache_argument(model, cache)).logits for part in ids.split(size, 1)], 1)


@pytest.mark.parametrize("name", PLANS)
def test_one_shot_and_every_chunking(model, name):
    """Chunks that a ring takes without losing a token that is still seen, up to rollback + 1 tokens, and longer ones."""
    assert kv_sources(model.config) == SOURCES
    plan, ids = plan_of(model, name), prompt(47, batch=2)
    with torch.no_grad():
        with meant(model, plan):
            expected = model(ids).logits
        with zz.zigzag(model, plan):
            assert close(model(ids, use_cache=False).logits, expected)
            for size, rollback in ((47, 0), (19, 0), (19, 30), (5, 4), (5, 3)):
                cache = zz.ZigzagCache(model.config, plan, rollback=rollback)
                assert close(in_chunks(model, cache, ids, size), expected), f"chunks of {size}, rollback {rollback}"


@pytest.mark.parametrize("name", PLANS)
def test_padded_batch_over_five_windows_of_decoding(model, name):
    plan, batch = plan_of(model, name), padded_prompt([30, 17, 3])
    with zz.zigzag(model, plan, prefill_chunk=7):
        answer, logits = logits_of(model, 5 * WINDOW + 3, **batch)
    with meant(model, plan):
        assert close(logits, next_logits(model, answer, **batch))


def test_padding_behind_tokens(model):
    """Columns are brought into another order for the ops, and back: queries in each layer, keys where they come."""
    ids, lengths = prompt(20, batch=2), (20, 9)
    mask = (torch.arange(20) < torch.tensor(lengths)[:, None]).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = zz.ZigzagCache(model.config)
    with zz.zigzag(model), torch.no_grad():
        logits = model(ids * mask, attention_mask=mask, position_ids=positions, **cache_argument(model, cache)).logits
    with stock(model), torch.no_grad():
        for row, length in enumerate(lengths):
            assert close(logits[row, :length], model(ids[row : row + 1, :length]).logits[0])


def test_beams(model):
    batch = padded_prompt([20, 11])
    with stock(model):
        expected = generate(model, 2 * WINDOW, num_beams=3, **batch)
    with zz.zigzag(model):
        assert generate(model, 2 * WINDOW, num_beams=3, **batch).equal(expected)


def test_speculation(model):
    """Several query rows per step, some of whose tokens are taken back."""
    ids = prompt(12).repeat(1, 3)
    with stock(model):
        expected = generate(model, 3 * WINDOW, ids)
    for draft in ("lookup", "streaming"):
        with zz.zigzag(model):
            got = generate(model, 3 * WINDOW, ids, custom_generate=zz.speculate(draft, tokens=3, window=9))
        assert got.equal(expected), draft


@pytest.mark.parametrize("family", SHARED)
def test_traced_steps(family, monkeypatch):
    monkeypatch.setattr(compiled._Backend, "__call__", traced_only)
    model = shared_model(family, WINDOW, num_hidden_layers=6, num_kv_shared_layers=2, layer_types=KINDS[:6])
    plan, batch = plan_of(model, "shared_streams"), padded_prompt([30, 17, 3])
    with zz.zigzag(model, plan, compile=True):
        answer, logits = logits_of(model, 3 * WINDOW, **batch)
    with meant(model, plan):
        assert close(logits, next_logits(model, answer, **batch))


def test_compiled_steps():
    """Of the newest family: two tables of cosines and sines, keys that two ops write."""
    model = shared_model(list(SHARED)[-1], WINDOW, num_hidden_layers=4, num_kv_shared_layers=2, layer_types=KINDS[:4])
    batch = padded_prompt([30, 17])
    with zz.zigzag(model, compile=True):
        answer, logits = logits_of(model, 2 * WINDOW, **batch)
    with stock(model):
        assert close(logits, next_logits(model, answer, **batch))


def test_quantised_rings_hold_each_token_once(gemma3n):
    """However often its codes are written: whatever the chunks, they are those of one shot, and close to plain ones."""
    plan, ids, held = plan_of(gemma3n, "shared_streams"), prompt(60), {}
    plain = zz.ZigzagCache(gemma3n.config, plan)
    with zz.zigzag(gemma3n, plan):
        expected = in_chunks(gemma3n, plain, ids, 60)
        for size, rollback in ((60, 0), (20, 0), (20, 19)):
            cache = held[size, rollback] = zz.ZigzagCache(gemma3n.config, plan.with_formats("int8", "int8"), rollback=rollback)
            found = in_chunks(gemma3n, cache, ids, size)
            assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()
            assert len(cache.layers) == 4 and cache.layers[2].keys.dtype == torch.int8
    first, second, slack = (cache.layers[3] for cache in held.values())
    assert (first.keys.int() - second.keys.int()).abs().max() <= 1  # hidden states differ by rounding
    assert slack.slots == 7 + 19


def test_smoothed_keys(gemma3n):
    plan, ids = plan_of(gemma3n, "shared_retrieves"), prompt(60)
    smooth = zz.Plan(plan.kinds, sink=2, window=5, layer_sizes=plan.layer_sizes, **QUANTISED)
    with zz.zigzag(gemma3n, plan):
        expected = in_chunks(gemma3n, zz.ZigzagCache(gemma3n.config, plan), ids, 60)
        found = in_chunks(gemma3n, zz.ZigzagCache(gemma3n.config, smooth), ids, 60)
    assert (found - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_what_a_cache_does_is_done_once(model, tmp_path):
    """Crops, copies, chosen rows, files and counts of bytes see the buffers of the layers that have keys, each once."""
    ids, rest = prompt(40, batch=2), prompt(6, batch=2, seed=2)
    cache = zz.ZigzagCache(model.config, rollback=9)
    with zz.zigzag(model), torch.no_grad():
        in_chunks(model, cache, torch.cat([ids, rest], 1), 46)
        token = 2 * 4 * sum(size.kv_heads * size.head_dim for size in geometries(model.config)[1::2])
        ring = 2 * 4 * sum(size.kv_heads * size.head_dim for size in geometries(model.config)[::2])
        assert cache.kv_bytes() == 2 * (46 * token + (WINDOW + 9) * ring)
        assert cache.memory_report().splitlines()[-1].startswith("all        4 layers")
        cache.crop(40)
        assert not hasattr(cache, "shared_layers")
        cache.save(tmp_path / "cache")
        others = [copy.deepcopy(cache), zz.ZigzagCache.load(tmp_path / "cache", model)]
        expected = in_chunks(model, cache, rest, 6)
        for other in others:
            assert in_chunks(model, other, rest, 6).equal(expected)
        cache.crop(40)
        cache.batch_select_indices([1])
        assert close(in_chunks(model, cache, rest[1:], 6), expected[1:])
        cache.reset()
        whole = in_chunks(model, cache, torch.cat([ids, rest], 1), 46)
    assert close(whole[:, 40:], expected)


def test_a_forward_that_fails_between_readers_leaves_the_cache_as_it_was(gemma3n):
    ids, cache = prompt(26), zz.ZigzagCache(gemma3n.config, rollback=6)
    failing = gemma3n.model.layers[6].self_attn
    with zz.zigzag(gemma3n):
        in_chunks(gemma3n, cache, ids[:, :20], 20)
        with pytest.raises(KeyError, match="half-way"):
            failing.forward = _fail
            in_chunks(gemma3n, cache, ids[:, 20:] + 1, 6)
        del failing.forward
        found = in_chunks(gemma3n, cache, ids[:, 20:], 6)
        assert close(found, in_chunks(gemma3n, zz.ZigzagCache(gemma3n.config), ids, 26)[:, 20:])


def _fail(*arguments, **options):
    raise KeyError("half-way")


def test_bytes_of_a_solved_plan_are_those_of_its_cache(model):
    full = geometries(model.config)[1]
    scores = [[0.9] * full.kv_heads, [0.1] * full.kv_heads]
    plan = zz.solve(scores, retrieval_layers=1, config=model.config, sink=2, window=5, context=46, element_bytes=4)
    assert plan.kinds == ("native", "retrieval", "native", "streaming")
    cache = zz.ZigzagCache(model.config, plan)
    with zz.zigzag(model, plan):
        in_chunks(model, cache, prompt(46), 46)
    assert cache.kv_bytes() == plan.provenance["kv_bytes"]


@pytest.mark.skipif("gemma4_text" not in SHARED, reason="this transformers has no Gemma 4")
def test_the_head_dims_of_gemma4():
    model, ids = shared_model("gemma4_text", WINDOW, global_head_dim=512, num_hidden_layers=6, layer_types=KINDS[:6]), prompt(30)
    with stock(model), torch.no_grad():
        expected = model(ids).logits
    with zz.zigzag(model):
        assert close(in_chunks(model, zz.ZigzagCache(model.config), ids, 29), expected)
    assert served(model.config).refusal is None


def test_prompts_in_shared_caches_are_not_compressed(model):
    with pytest.raises(ValueError, match="prompts in KV caches that layers share cannot be compressed"):
        zz.ZigzagCache(model.config, compress=zz.PromptWindows(budget=0.5))


@pytest.mark.parametrize(
    "config, expected",
    [
        ({"global_head_dim": 128, "num_global_key_value_heads": 1, "attention_k_eq_v": True}, Geometry(4, 1, 128)),
        ({"global_head_dim": 128, "num_global_key_value_heads": 1, "attention_k_eq_v": False}, Geometry(4, 2, 128)),
        ({"per_layer_config": {"1": {"head_dim": 96}}}, Geometry(4, 2, 96)),
        ({}, Geometry(4, 2, 64)),
    ],
)
def test_geometry_of_layers_in_config_files(config, expected):
    common = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2}
    config = {"layer_types": ["sliding_attention", "full_attention"]} | common | config
    assert geometries(config) == (Geometry(4, 2, 64), expected)
    assert geometries({"text_config": config, "model_type": "gemma4"}) == (Geometry(4, 2, 64), expected)


def test_layers_that_read_from_no_other_are_refused():
    with pytest.raises(ValueError, match="layer 2 shares the KV cache of an earlier 'full_attention' layer, and there is none"):
        kv_sources({"layer_types": ["sliding_attention"] * 2 + ["full_attention"], "num_kv_shared_layers": 1})
