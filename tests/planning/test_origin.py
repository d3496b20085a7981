"""What scores and plans are made for: read from configs, kept in every file, handed from scores to plans. No model."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig, GPT2Config, LlamaConfig, LlavaConfig

from zigzag_ext.planning.costs import kv_costs
from zigzag_ext.planning.exchange import from_duo, to_duo
from zigzag_ext.planning.origin import element_bytes_of, known, origin_of, other_model
from zigzag_ext.planning.plan import Plan
from zigzag_ext.planning.scores import Scores, load_scores, save_scores
from zigzag_ext.planning.solve import solve

SIZES = {"layers": 4, "kv_heads": 2, "head_dim": 64, "query_heads": 8}
ORIGIN = {"model": "org/tiny é", "method": "retrieval", **SIZES}
MATRIX = np.array([[0.9, 0.7], [0.1, 0.2], [0.8, 0.1], [0.0, 0.3]])
RAW = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64}


def llama(**changes):
    return LlamaConfig(hidden_size=512, **RAW | changes)


@pytest.mark.parametrize("name", ["s.tsv", "s.csv", "s.npy", "folder"])
def test_files_keep_the_origin_and_other_readers_see_scores_only(tmp_path, name):
    path = tmp_path / name
    save_scores(Scores(MATRIX, ORIGIN), path)
    loaded = load_scores(path)
    assert loaded.origin == ORIGIN and list(loaded.origin) == list(ORIGIN)
    table = path / "full_attention_heads.tsv" if path.is_dir() else path
    seen = np.load(table) if name == "s.npy" else np.loadtxt(table, delimiter="," if name == "s.csv" else "\t")
    np.testing.assert_array_equal(seen, MATRIX)
    np.testing.assert_array_equal(loaded, MATRIX)
    save_scores(MATRIX, path)
    assert load_scores(path).origin == {"layers": 4, "kv_heads": 2}


def test_what_is_computed_from_scores_is_a_plain_array():
    scores = Scores(MATRIX, ORIGIN)
    for computed in (scores.mean(1), np.clip(scores, 0, 0.5), 1 - scores):
        assert type(computed) is np.ndarray
    assert type(scores.max()) is type(scores[0, 0]) is np.float64
    assert scores[::-1].origin == {} == scores.copy().origin


def test_files_without_an_origin_or_with_something_else_read_as_before(tmp_path):
    path = tmp_path / "s.tsv"
    path.write_text("# zigzag\n# {}\n0.5\t1\n")
    assert load_scores(path).origin == {"layers": 1, "kv_heads": 2}
    for behind in (b"bytes", np.arange(3), np.array("text"), np.array([None])):
        with (tmp_path / "s.npy").open("wb") as file:
            np.save(file, MATRIX)
            file.write(behind) if isinstance(behind, bytes) else np.save(file, behind, allow_pickle=True)
        assert load_scores(tmp_path / "s.npy").origin == {"layers": 4, "kv_heads": 2}


def test_a_note_that_contradicts_its_file_is_refused(tmp_path):
    path = tmp_path / "s.tsv"
    path.write_text('# zigzag-scores {"layers": 4, "kv_heads": 8}\n0.5\t1\n')
    with pytest.raises(ValueError, match=r"s.tsv says that it has layers 4, kv_heads 8, it holds scores \[1, 2\]"):
        load_scores(path)
    path.write_text("# zigzag-scores {4 layers}\n0.5\t1\n")
    with pytest.raises(ValueError, match="s.tsv: what follows 'zigzag-scores' is not JSON"):
        load_scores(path)


@pytest.mark.parametrize(
    "config",
    [
        llama(),
        RAW,
        SimpleNamespace(**RAW),
        SimpleNamespace(**RAW, hidden_size=99),
        {**RAW, "head_dim": None, "hidden_size": 512},
        {"text_config": RAW, "num_hidden_layers": 30},
        LlavaConfig(
            text_config=llama(),
            vision_config=CLIPVisionConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1),
        ),
    ],
)
def test_configs_of_every_kind(config):
    assert origin_of(config) == SIZES


def test_other_configs():
    assert origin_of(GPT2Config(n_embd=256, n_layer=3, n_head=4)) == {**SIZES, "layers": 3, "kv_heads": 4, "query_heads": 4}
    assert origin_of({**RAW, "multi_query": True})["kv_heads"] == 1
    assert origin_of({name: RAW[name] for name in RAW if name != "num_key_value_heads"})["kv_heads"] == 8


def test_the_name_is_what_the_config_was_read_from(tmp_path):
    llama().save_pretrained(tmp_path / "tiny")
    source = str(tmp_path / "tiny")
    assert origin_of(AutoConfig.from_pretrained(source)) == {"model": source, **SIZES}
    named = lambda name: {"model": name}  # noqa: E731
    assert not other_model(named("org/tiny"), named(source + "/")) and other_model(named("org/tiny"), named("org/tiny2"))
    assert not other_model({}, named("a")) and not other_model(named("a"), {})


@pytest.mark.parametrize(
    "config,error,message",
    [
        ({**RAW, "num_attention_heads": None}, ValueError, "config.num_attention_heads is None; it must be one positive number"),
        ({**RAW, "num_key_value_heads": [2, 4]}, ValueError, r"config.num_key_value_heads is \[2, 4\]"),
        ({**RAW, "num_hidden_layers": True}, ValueError, "config.num_hidden_layers is True"),
        ({**RAW, "head_dim": None}, ValueError, "config.hidden_size is None"),
        (SimpleNamespace(), ValueError, "config.num_hidden_layers is None"),
        ("org/tiny", TypeError, "config must be a model's config .* got 'org/tiny'"),
    ],
)
def test_configs_without_a_geometry_are_refused(config, error, message):
    with pytest.raises(error, match=message):
        origin_of(config)
    with pytest.raises(error, match=message):
        solve(MATRIX, config=config)


@pytest.mark.parametrize(
    "config,size",
    [
        (llama(dtype="float32"), 4),
        (llama(dtype=torch.bfloat16), 2),
        (llama(), 2),
        ({"torch_dtype": "float32"}, 4),
        ({"dtype": "float16", "torch_dtype": "float32"}, 2),
        ({"text_config": {"hidden_size": 1}, "dtype": "float32"}, 4),
        ({"dtype": "float8_e4m3fn"}, 2),
    ],
)
def test_bytes_of_an_element(config, size):
    assert element_bytes_of(config) == size


@pytest.mark.parametrize("level", ["layer", "head"])
def test_solve_reckons_with_the_geometry_of_the_config(level):
    shape = {"context": 1000, "sink": 4, "window": 16}
    plan = solve(MATRIX, 0.5, level=level, config=llama(dtype="float32"), **shape)
    assert plan.origin == SIZES == plan.provenance["origin"]
    assert (plan.provenance["head_dim"], plan.provenance["element_bytes"]) == (64, 4)
    assert plan == solve(MATRIX, 0.5, level=level, config=RAW | {"dtype": "float32"}, **shape)
    full, ring = kv_costs(4, 2, 64, 4, 1000, sink=4, window=16)
    assert plan.provenance["kv_bytes"] == (sum(full) + sum(ring)) / 2
    given = solve(MATRIX, 0.5, level=level, config=llama(dtype="float32"), head_dim=128, element_bytes=2, **shape)
    assert given.provenance["kv_bytes"] == plan.provenance["kv_bytes"] and given.provenance["head_dim"] == 128
    budget = full[0] + 3 * ring[0]
    assert len(solve(MATRIX, kv_bytes=budget, config=llama(dtype="float32"), **shape).retrieval_layers) == 1


def test_solve_hands_on_what_the_scores_know():
    scores = Scores(MATRIX, ORIGIN)
    plan = solve(scores)
    assert plan.origin == ORIGIN and plan.provenance["head_dim"] == 64
    assert "model = org/tiny é, method = retrieval, layers = 4" in plan.summary()
    config = llama()
    config._name_or_path = "org/another"
    assert solve(scores, config=config).origin == ORIGIN
    assert solve(MATRIX, config=config).origin == {"model": "org/another", **SIZES}
    assert solve(MATRIX).origin == {"layers": 4, "kv_heads": 2} and solve(MATRIX).provenance["head_dim"] == 128


@pytest.mark.parametrize(
    "scores,message",
    [
        (np.ones((4, 4)), r"scores are for 4 layers x 4 KV heads; the model has 4 layers x 2 KV heads of head_dim 64 \(org/m\)"),
        (np.ones((3, 2)), "scores are for 3 layers x 2 KV heads; the model has 4 layers x 2 KV heads"),
        (np.ones((4, 1)), "scores are for 4 layers x 1 KV heads; the model has 4"),
        (
            Scores(MATRIX, {"head_dim": 128, "model": "org/s"}),
            r"2 KV heads of head_dim 128 \(org/s\); the model has .* 64 \(org/m\)",
        ),
    ],
)
def test_scores_of_another_geometry_are_refused(scores, message):
    config = llama()
    config._name_or_path = "org/m"
    for level in ("layer", "head"):
        with pytest.raises(ValueError, match=message):
            solve(scores, level=level, config=config)


def test_a_plan_file_keeps_the_origin_in_its_provenance(tmp_path):
    path = tmp_path / "plan.json"
    solve(Scores(MATRIX, ORIGIN)).save(path)
    content = json.loads(path.read_text())
    assert content["version"] == 1 and content["provenance"]["origin"] == ORIGIN
    assert Plan.load(path).origin == ORIGIN
    for provenance in ({}, {"origin": "a paper"}, {"origin": [4]}, {"origin": {"layers": "4", "kv_heads": 2.0, "seed": 1}}):
        path.write_text(json.dumps(content | {"provenance": provenance}))
        assert Plan.load(path).provenance == provenance and Plan.load(path).origin == {}
    assert known({"layers": True}) == {}


def test_duo_folders_keep_the_origin(tmp_path):
    plan = solve(Scores(MATRIX, ORIGIN), 0.5)
    to_duo(plan, tmp_path / "pattern", kv_heads=2)
    again = from_duo(tmp_path / "pattern")
    assert again.kinds == plan.kinds and again.origin == ORIGIN
    assert from_duo(tmp_path / "pattern", sparsity=0.5).origin == ORIGIN
    with pytest.raises(ValueError, match="the plan is for layers of 2 KV heads, these have 4"):
        to_duo(plan, tmp_path / "other", kv_heads=4)
    assert not (tmp_path / "other").exists()
