"""Plans in other projects' formats: DuoAttention folders through its own rules, window configurations, layer strings."""

import json
import warnings

import numpy as np
import pytest
from transformers import Qwen2Config

from zigzag_ext.planning.exchange import from_duo, from_layer_string, to_duo, to_layer_string, to_layer_types
from zigzag_ext.planning.plan import Plan
from zigzag_ext.planning.scores import load_scores, save_scores
from zigzag_ext.planning.solve import solve


def a_plan(layers, retrieval, sink=64, window=256):
    return Plan(["retrieval" if i in retrieval else "streaming" for i in range(layers)], sink=sink, window=window)


def duo_load(folder):
    """What DuoAttention's loader does: its array, its two sizes."""
    config = json.loads((folder / "config.json").read_text())
    heads = np.clip(np.loadtxt(folder / "full_attention_heads.tsv", dtype=float, delimiter="\t"), 0, 1)
    return heads, config["sink_size"], config["recent_size"]


def duo_sparsify(heads, sparsity, seed):
    """What DuoAttention does before it runs: noise against ties, then the quantile as threshold."""
    noisy = heads + np.random.default_rng(seed).uniform(0, 1e-6, heads.shape)
    threshold = 2 if sparsity >= 1 else -1 if sparsity <= 0 else np.quantile(noisy, sparsity)
    return noisy >= threshold


@pytest.mark.parametrize("layers, kv_heads", [(2, 2), (5, 3), (28, 4), (32, 8), (32, 32), (126, 8)])
def test_duo_runs_the_plan_at_the_stored_sparsity(tmp_path, layers, kv_heads):
    rng = np.random.default_rng(layers)
    for count in range(layers + 1):
        plan = a_plan(layers, set(rng.permutation(layers)[:count].tolist()), sink=4, window=100)
        to_duo(plan, tmp_path / "pattern", kv_heads)
        heads, sink, recent = duo_load(tmp_path / "pattern")
        sparsity = json.loads((tmp_path / "pattern" / "config.json").read_text())["sparsity"]
        assert (heads.shape, sink, recent) == ((layers, kv_heads), 4, 100)
        assert sparsity == pytest.approx(1 - plan.retrieval_ratio, abs=1e-12)
        for seed in range(3):
            np.testing.assert_array_equal(duo_sparsify(heads, sparsity, seed), heads == 1)
        assert from_duo(tmp_path / "pattern").kinds == plan.kinds


def test_the_quantile_trap(tmp_path):
    """At any other sparsity DuoAttention splits layers at random: the warning in to_duo's documentation."""
    to_duo(a_plan(32, set(range(8))), tmp_path, 8)
    heads, *_ = duo_load(tmp_path)
    for sparsity in (0.5, 0.7, 0.8):
        masks = [duo_sparsify(heads, sparsity, seed) for seed in range(2)]
        assert (masks[0] != masks[1]).any()
        assert any(len(set(row)) == 2 for row in masks[0].tolist())


def test_from_duo_refuses_what_is_no_plan(tmp_path):
    with pytest.raises(FileNotFoundError, match="full_attention_heads.tsv"):
        from_duo(tmp_path)
    save_scores([[1, 1], [0, 0.5]], tmp_path)
    with pytest.raises(ValueError, match="layer 1 is not all ones and zeros"):
        from_duo(tmp_path)
    save_scores([[1, 1], [0, 0]], tmp_path, sink=2, window=3)
    assert from_duo(tmp_path).kinds == ("retrieval", "streaming")
    for text in ("{}", "[]", "nothing", '{"sink_size": 4}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="sink_size and recent_size"):
            from_duo(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        from_duo(tmp_path)
    with pytest.raises(ValueError, match="kv_heads must be at least 1, got 0"):
        to_duo(a_plan(2, {0}), tmp_path, 0)


def test_a_plan_of_duo_scores_survives_the_round_trip(tmp_path):
    plan = solve(np.random.default_rng(0).random((16, 4)), 0.25)
    to_duo(plan, tmp_path, 4)
    assert from_duo(tmp_path).kinds == plan.kinds
    assert solve(load_scores(tmp_path), 0.25).kinds == plan.kinds


def test_layer_types_reach_a_transformers_config():
    with pytest.warns(UserWarning, match="2 layers lose the first 4 tokens and keep only the last 7"):
        entries = to_layer_types(a_plan(4, {0, 3}, sink=4, window=7))
    config = Qwen2Config(num_hidden_layers=4, **json.loads(json.dumps(entries)))
    assert config.layer_types == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    assert config.sliding_window == 7


def test_layer_types_warn_only_where_sinks_are_lost():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_layer_types(a_plan(4, {0}, sink=0))
        entries = to_layer_types(a_plan(4, {0, 1, 2, 3}))
    assert entries["layer_types"] == ["full_attention"] * 4 and not entries["use_sliding_window"]


def test_layer_strings():
    plan = from_layer_string("0101", sink=128, window=256)
    assert plan.kinds == ("retrieval", "streaming", "retrieval", "streaming") and (plan.sink, plan.window) == (128, 256)
    assert to_layer_string(plan) == "0101"
    with pytest.raises(ValueError, match="0 .retrieval. and 1 .streaming. only, got '2'"):
        from_layer_string("012", sink=1, window=1)
    with pytest.raises(ValueError):
        from_layer_string("", sink=1, window=1)
