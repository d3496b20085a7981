"""The gallery of plans: every plan is what its scores say, every source is named, and what is unknown is said to be."""

import ast
import json
import re
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from published import PUBLISHED, needs_published

import zigzag_ext as zz
from zigzag_ext.planning import gallery
from zigzag_ext.planning.origin import other_model
from zigzag_ext.planning.scores import load_scores

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "zigzag_ext" / "planning" / "gallery"
ENTRIES = gallery.entries()
LLAMA = "meta-llama/Llama-3.1-8B-Instruct"
QWQ = "cxdu/QwQ-32B-LightTransfer"
RATIOS = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]
# selected_lazy_layers of SWAA's *_lazy_layers_freq.json: what its authors made of the same frequencies, at half of the layers.
SWAA = {
    LLAMA: [2, 3, 6, 7, 12, *range(15, 21), 22, 28, 29, 30, 31],
    "Qwen/Qwen3-4B-Instruct-2507": [0, *range(7, 17), *range(19, 24), 25, 35],
    "Qwen/Qwen3-4B-Thinking-2507": [0, *range(7, 17), *range(19, 24), 25, 35],
    "Qwen/Qwen3-30B-A3B-Instruct-2507": [
        3, 4, 7, 8, 9, 12, 16, 20, 21, 24, 25, 28, 29, 31, 32, 33, 35, 36, 37, 38, 40, 41, 42, 47,
    ],
    "Qwen/Qwen3-30B-A3B-Thinking-2507": [
        3, 4, 7, 8, 9, 12, 13, 16, 20, 21, 24, 28, 29, 31, 32, 33, 35, 36, 37, 38, 40, 41, 42, 47,
    ],
}  # fmt: skip


def name(entry) -> str:
    return f"{entry.source}-{entry.model}"


def best_layers(scores: np.ndarray, count: int) -> tuple[int, ...]:
    """The layers with the highest mean scores, of equal ones the lower layer: `solve`'s rule, computed anew."""
    means = scores.mean(1).tolist()
    return tuple(sorted(sorted(range(len(means)), key=lambda layer: (-means[layer], layer))[:count]))


def kvzip_scores(entry) -> np.ndarray:
    names = {
        (LLAMA, "kvzip"): ["llama3.1-8b-scbench_qa_eng-0.pt"],
        ("Qwen/Qwen2.5-14B-Instruct-1M", "kvzip"): ["qwen2.5-14b-scbench_qa_eng-0.pt"],
        ("Qwen/Qwen2.5-7B-Instruct-1M", "kvzip"): ["qwen2.5-7b-scbench_qa_eng-0.pt"],
        ("Qwen/Qwen2.5-7B-Instruct-1M", "kvzip-code"): ["qwen2.5-7b-scbench_qa_eng-0.pt", "qwen2.5-7b-scbench_repoqa-0.pt"],
    }[entry.model, entry.source]
    return np.maximum.reduce([np.asarray(load_scores(PUBLISHED / each)) for each in names])


def test_there_are_plans_for_a_dozen_models_and_each_names_its_source():
    models = {entry.model for entry in ENTRIES}
    assert len(models) >= 12 and f"plans for {len(models)} models" in (ROOT / "README.md").read_text()
    assert len({(entry.model, entry.source) for entry in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        plan = zz.load_plan(entry.model, source=entry.source)
        assert entry.url in plan.provenance["source"] and re.fullmatch(r"\d{4}-\d\d-\d\d", entry.date)
        assert plan.provenance["licence"] and plan.provenance["measured"]
        assert plan.provenance["check"] == f"zigzag eval {entry.model} --plan FILE"
        assert {"model", "method", "layers", "kv_heads", "head_dim", "query_heads"} == plan.origin.keys()
        assert plan.origin["model"] == entry.model and plan.num_layers == plan.origin["layers"]
        assert (plan.sink, plan.window) == (entry.sink, entry.window)
        assert sum(given is not None for given in (entry.scores, entry.order, entry.streaming)) == 1
        assert entry.url in plan.summary() and entry.measured[:60] in plan.summary()


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.scores], ids=name)
def test_plans_follow_from_the_scores_that_are_shipped(entry):
    scores = gallery.scores_of(entry.model, entry.source)
    assert scores.shape == (scores.origin["layers"], scores.origin["kv_heads"]) and scores.origin["model"] == entry.model
    for ratio in RATIOS:
        plan = zz.load_plan(entry.model, ratio, source=entry.source)
        assert plan.retrieval_layers == best_layers(scores, int(ratio * len(scores) + 0.5))
        assert plan.kinds == zz.solve(scores, ratio).kinds and 0 <= plan.retained_score <= 1


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.source == "swaa"], ids=name)
def test_half_of_the_layers_are_those_that_the_authors_chose(entry):
    assert list(zz.load_plan(entry.model, 0.5, source="swaa").streaming_layers) == SWAA[entry.model]
    scores = gallery.scores_of(entry.model, "swaa")
    assert (scores == scores[:, :1]).all()
    # Every prompt makes half of the layers lazy; numbers of prompts are 500 and 1000, three digits are exact.
    assert (1 - scores[:, 0]).sum() == pytest.approx(len(scores) / 2, abs=1e-9)


def test_the_demo_models_scores_are_those_of_the_evidence():
    evidence = ROOT / "benchmarks" / "results" / "evidence"
    scores = load_scores(evidence / "head_scores" / "retrieval.tsv")
    np.testing.assert_array_equal(gallery.scores_of("HuggingFaceTB/SmolLM2-135M-Instruct"), scores)
    plan = zz.load_plan("smollm2-135m-instruct-0.1.2", 0.5)
    assert f"retrieval,mean,0.5,{zz.exchange.to_layer_string(plan)}" in (evidence / "plans.csv").read_text().splitlines()


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.source.startswith("kvzip")], ids=name)
def test_an_order_of_layers_is_whole_and_is_all_that_its_plans_know(entry):
    assert sorted(entry.order) == list(range(entry.origin["layers"]))
    for ratio in RATIOS:
        count = int(ratio * len(entry.order) + 0.5)
        plan = zz.load_plan(entry.model, ratio, source=entry.source)
        assert plan.retrieval_layers == tuple(sorted(entry.order[:count]))
        assert not {"retained_score", "layer_values", "objective_value", "scores"} & plan.provenance.keys()
    with pytest.raises(ValueError, match=f"the scores of '{entry.source}' for .* are not shipped .licence: MIT by its README"):
        gallery.scores_of(entry.model, entry.source)


@needs_published
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.source.startswith("kvzip")], ids=name)
def test_an_order_of_layers_is_that_of_the_published_scores(entry):
    scores = kvzip_scores(entry)
    assert scores.shape == (entry.origin["layers"], entry.origin["kv_heads"])
    for count in range(len(scores) + 1):
        plan = zz.load_plan(entry.model, count / len(scores), source=entry.source)
        assert plan.retrieval_layers == best_layers(scores, count)


@needs_published
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.source == "duo"], ids=name)
def test_the_gates_are_the_published_ones(entry):
    [folder] = [f for f in PUBLISHED.iterdir() if f.name.removeprefix("Meta-") == entry.model.split("/")[1]]
    np.testing.assert_array_equal(np.loadtxt(FOLDER / entry.scores), np.loadtxt(folder / "full_attention_heads.tsv"))


def test_the_published_plan_is_one_plan():
    plan = zz.load_plan(QWQ)
    assert plan.streaming_layers == (*range(5, 25), 26, 27, 28, 30, 31, 32, 33, 35, 37, 38, 43, 51)
    assert plan == zz.load_plan(QWQ, 0.5) and (plan.sink, plan.window) == (129, 1025)
    with pytest.raises(ValueError, match="has one published plan, of retrieval_ratio 0.5; got 0.25"):
        zz.load_plan(QWQ, 0.25)


@pytest.mark.parametrize("other", ["meta-llama/Meta-Llama-3.1-8B-Instruct", "unsloth/llama-3.1-8b-instruct", f"/data/{LLAMA}/"])
def test_other_names_of_the_same_weights(other):
    plan, known = zz.load_plan(other), zz.load_plan(LLAMA)
    assert plan.kinds == known.kinds and plan.origin == known.origin | {"model": other}
    assert "scored_model" not in plan.provenance and not other_model(plan.origin, {"model": other})


def test_a_fine_tune_gets_the_plan_of_the_model_that_was_scored_and_says_so():
    plan = zz.load_plan("nvidia/Llama-3.1-Nemotron-Nano-8B-v1")
    assert plan.kinds == zz.load_plan(LLAMA).kinds and plan.origin["model"] == LLAMA
    assert other_model(plan.origin, {"model": "nvidia/Llama-3.1-Nemotron-Nano-8B-v1"}), "enable warns of it"
    assert plan.provenance["scored_model"].startswith(f"{LLAMA}; nvidia/Llama-3.1-Nemotron-Nano-8B-v1 was trained further")
    names = [other for entry in ENTRIES for other in (*entry.same, *entry.finetunes)]
    assert len({zz.load_plan(other) for other in names}) >= 3
    scored = {entry.model for entry in ENTRIES}
    assert not scored & set(names), "a name is either scored or another name"


def test_sources_and_sizes_can_be_chosen():
    by_source = {source: zz.load_plan(LLAMA, source=source) for source in ("duo", "kvzip", "swaa")}
    assert len({plan.kinds for plan in by_source.values()}) == 3 and zz.load_plan(LLAMA) == by_source["duo"]
    plan = zz.load_plan(LLAMA, source="kvzip", sink=4, window=12)
    assert (plan.sink, plan.window) == (4, 12) and plan.kinds == by_source["kvzip"].kinds
    assert zz.load_plan(QWQ, sink=4, window=1020).window == 1020


def test_a_plan_file_keeps_what_the_gallery_says(tmp_path):
    plan = zz.load_plan(LLAMA, 0.25)
    plan.save(tmp_path / "plan.json")
    assert zz.Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 1


@pytest.mark.parametrize(
    "arguments,options,error,message",
    [
        (
            ("org/new model",),
            {},
            ValueError,
            "no plan for 'org/new model'; .*zigzag identify 'org/new model' -o scores.tsv, ",
        ),
        (("meta-llama/Llama-3.2-8B-Instruct",), {}, ValueError, rf"it has one for {LLAMA}"),
        (("",), {}, ValueError, "no plan for ''"),
        ((LLAMA, 1.5), {}, ValueError, "retrieval_ratio must .*1.5"),
        (("Qwen/Qwen2.5-7B-Instruct-1M", -0.1), {}, ValueError, "retrieval_ratio must .*-0.1"),
        ((LLAMA, "half"), {}, TypeError, "retrieval_ratio must be a number, got 'half'"),
        ((LLAMA,), {"source": "lazy"}, ValueError, f"no scores of {LLAMA} by 'lazy'; supported: duo, kvzip, swaa"),
        ((LLAMA,), {"window": 0}, ValueError, "window must be"),
        ((QWQ,), {"sink": -1}, ValueError, "sink must be"),
        ((None,), {}, TypeError, "model must be a model's name or folder, got None"),
    ],
)
def test_what_cannot_be_served_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        zz.load_plan(*arguments, **options)


def test_a_plan_file_is_not_a_model(tmp_path):
    path = tmp_path / "plan.json"
    zz.load_plan(LLAMA).save(path)
    with pytest.raises(ValueError, match="plan.json is a file: Plan.load reads plan files"):
        zz.load_plan(path)


def test_the_message_gives_the_prompts_and_times_of_identify():
    from zigzag_ext.study.identify.retrieval import METHOD

    with pytest.raises(ValueError) as raised:
        zz.load_plan("org/new")
    text = str(raised.value)
    assert text.endswith("windows of its own needs no plan to keep just those: zigzag_ext.enable(model)")
    assert f"{METHOD.PROMPTS} prompts of {METHOD.TOKENS} tokens" in text
    evidence = " ".join((ROOT / "docs" / "evidence.md").read_text().split())
    assert "*retrieval* 146" in evidence and "146 s on two CPU cores" in text
    assert "*retrieval* (three seconds on a GPU)" in evidence and "seconds on a GPU" in text


def test_a_plan_is_refused_by_a_model_of_another_geometry():
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=256, num_hidden_layers=32, num_attention_heads=8, num_key_value_heads=4, head_dim=32)
    with pytest.raises(ValueError, match="32 layers x 8 KV heads of head_dim 128 .*; the model has 32 layers x 4 KV heads"):
        zz.ZigzagCache(config, zz.load_plan(LLAMA), max_len=64)


def test_every_file_is_small_used_and_packaged():
    files = {path.name: path for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"}
    assert sum(path.stat().st_size for path in files.values()) < 64 * 1024
    assert files.keys() == {entry.scores for entry in ENTRIES if entry.scores} | {"index.json", "NOTICE.md"}
    project = (ROOT / "pyproject.toml").read_text()
    patterns = ast.literal_eval(re.search(r"^zigzag_ext = (\[.*?\])", project, re.MULTILINE | re.DOTALL)[1])
    unpacked = [path for path in files if not any(fnmatch(f"planning/gallery/{path}", pattern) for pattern in patterns)]
    assert not unpacked
    notice = files["NOTICE.md"].read_text()
    assert all(f"{source}.*" in notice for source in ("duo", "swaa", "zigzag")) and "Copyright (c) 2024 MIT HAN Lab" in notice
    assert '"zigzag_ext/planning/gallery/NOTICE.md"' in project
