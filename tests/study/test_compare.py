"""`zigzag compare`: lines are what `solve` and the tasks give, budgets hold, interrupted runs go on, bad methods are named."""

import csv
import json
import sys
from itertools import combinations

import numpy as np
import pytest
from transformers import Gemma3TextConfig

import zigzag_ext as zz
from zigzag_ext.study import evaluate, loading
from zigzag_ext.study.compare import Settings, choices, compare, figures, jaccard, run, sources_of
from zigzag_ext.study.layer_times import machine_name, measure_costs

from .conftest import KV_HEADS, LAYERS
from .test_study_commands import collisions, drawn, failure, zigzag  # noqa: F401

SMALL = {"sink": 4, "window": 32, "context": 2000}
COSTS = {"context": [2000], "retrieval": [1.0], "streaming": [0.1], "mixed": [[0.8]], "other": 0.5}
READING = ["--identify-tokens", 1600, "--identify-prompts", 1, "--sink", 4, "--window", 32, "--context", 2000]
OWN = """
import numpy as np
def reversed_layers(model, tokenizer, *, sink, window, seed, tokens=None, prompts=None):
    assert (sink, window, seed) == (4, 32, 0)
    return np.linspace({last}, 0.5, 6).reshape(3, 2)
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a method, a score file and a cost table, that commands are given in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outside.py").write_text(OWN.format(last=1.0))
    zz.save_scores([[0.2, 0.9], [0.8, 0.1], [0.3, 0.4]], tmp_path / "found.tsv")
    (tmp_path / "costs.json").write_text(json.dumps(COSTS))
    yield tmp_path
    forget()


def forget() -> None:
    """The next import reads the files again."""
    for name in ("outside", "broken"):
        sys.modules.pop(name, None)


def settings(here, **options) -> Settings:
    names = options.pop("methods", ["lazy", "outside:reversed_layers", "found.tsv", "even"])
    tasks = {"tasks": (evaluate.passkey, evaluate.perplexity), "lengths": (500,), "depths": (0.0, 1.0), "prompts": 1}
    same = {"ratios": (1 / 3, 2 / 3), "costs": here / "costs.json", "tokens": 1600, "samples": 1}
    return Settings(sources_of(names, tokens=1600, prompts=1), **SMALL | tasks | same | options)


def of_heads(kinds: str) -> np.ndarray:
    """bool [layers, kv_heads] from the column `kinds`."""
    layers = kinds.split("/") if "/" in kinds else [kind * KV_HEADS for kind in kinds]
    return np.array([[kind == "0" for kind in layer] for layer in layers])


def test_lines_are_what_solve_and_the_tasks_give(model, tokenizer, here):
    given = settings(here)
    lines, overlaps = compare(model, tokenizer, given, here / "out")
    assert len(lines) == 2 * (1 + 2 * 2 * (4 + 3))  # tasks x (full attention, ratios x budgets x (methods of layers, of heads))
    scores = {"found": zz.load_scores(here / "found.tsv")}
    scores["lazy"] = zz.identify(model, tokenizer, "lazy", tokens=1600, prompts=1, sink=4, window=32)
    common = {"config": model.config, "element_bytes": 4, "costs": COSTS, **SMALL}
    for line in lines:
        assert line.context == 2000 and line.ms_from == "table costs.json"
        if line.method == "full":
            assert line.kinds == "0" * LAYERS and line.kv_bytes == LAYERS * KV_HEADS * 2000 * 64 * 2 * 4
            continue
        count = round(line.ratio * LAYERS)
        heads = of_heads(line.kinds)
        kept = np.where(heads, 2000, 36).sum() * 64 * 2 * 4
        spent = sum({0: 0.1, 1: 0.8, 2: 1.0}[row.sum()] for row in heads) + 0.5
        limits = {
            "kv_bytes": (count * 2000 + (LAYERS - count) * 36) * KV_HEADS * 64 * 2 * 4,
            "ms": 0.5 + count + (LAYERS - count) * 0.1,
        }
        assert (line.kv_bytes, line.ms, line.limit) == pytest.approx((kept, spent, limits[line.equal]))
        assert getattr(line, line.equal) <= line.limit + 1e-9 and line.retrieves == pytest.approx(heads.mean())
        if line.level == "layer":
            assert heads.all(1).sum() == count
        if line.method in scores:
            plan = zz.solve(scores[line.method], level=line.level, **{line.equal: limits[line.equal]}, **common)
            assert evaluate.results.kinds_of(plan) == line.kinds
    heads_at = {(line.equal, line.ratio): line.retrieves for line in lines if line.level == "head" and line.method == "found"}
    assert heads_at["kv_bytes", 1 / 3] == pytest.approx(1 / 3) and heads_at["ms", 1 / 3] == pytest.approx(1 / 6)
    check_rows(model, tokenizer, lines[::5])
    check_overlaps(lines, overlaps)


def check_rows(model, tokenizer, lines) -> None:
    """Lines have what the tasks give under their plans."""
    for line in lines:
        plan = None if line.method == "full" else zz.Plan.from_heads(of_heads(line.kinds), sink=4, window=32)
        task, options = evaluate.TASKS[line.task], {"lengths": [500], "depths": [0.0, 1.0], "prompts": 1, "pooled": True}
        [row] = task(model, tokenizer, plan, **options)
        assert line.prompts == row.prompts == (2 if line.task == "passkey" else 1)
        for name in ("exact", "exact_low", "exact_high", "logprob", "logprob_low", "logprob_high"):
            assert getattr(line, name) == pytest.approx(getattr(row, name), rel=1e-5)


def check_overlaps(lines, overlaps) -> None:
    """By the definition of Jaccard's index, from the plans that the lines tell."""
    kinds = {(x.level, x.equal, x.ratio, x.method): of_heads(x.kinds) for x in lines if x.method != "full"}
    pairs = [pair for level, names in (("layer", 4), ("head", 3)) for pair in combinations(range(names), 2)]
    assert len(overlaps) == 2 * 2 * len(pairs)
    for each in overlaps:
        one, other = (kinds[each.level, each.equal, each.ratio, name] for name in (each.method, each.other))
        one, other = (one.all(1), other.all(1)) if each.level == "layer" else (one, other)
        assert (each.both, each.either) == ((one & other).sum(), (one | other).sum())
        assert each.jaccard == pytest.approx(each.both / each.either)
    assert jaccard(np.zeros(3, bool), np.zeros(3, bool)) == (1.0, 0, 0)


def test_budgets_that_layers_do_not_fill_are_kept_below(model, here):
    """Milliseconds of a layer that differ: the plan takes the most score that fits, and says how much less it takes."""
    table = COSTS | {"retrieval": [[1.0, 1.3, 1.9]], "streaming": [[0.1, 0.1, 0.1]]}
    chosen = compare_choices(model, settings(here, levels=("layer",), budgets=("ms",), ratios=(2 / 3,)), table)
    assert chosen["even"].limit == pytest.approx(chosen["even"].plan.provenance["ms"])
    assert all(choice.plan.provenance["ms"] <= choice.limit + 1e-9 for choice in chosen.values())
    assert chosen["found"].plan.retrieval_layers == (0, 1)


def compare_choices(model, given, table):
    scores = {"found": np.array([[0.2, 0.9], [0.8, 0.1], [0.3, 0.4]]), "even": None}
    return {choice.method: choice for choice in choices(scores, given, model.config, 4, table)}


def test_layers_with_a_window_of_their_own_are_no_method_s_to_choose(here):
    config = Gemma3TextConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64, sliding_window=48,
        sliding_window_pattern=2,
    )  # fmt: skip
    given = settings(here, methods=["even"], ratios=(0.5,))
    given.check(config)
    found = choices({"a": np.array([[0.9, 0.1], [0.2, 0.8]]), "even": None}, given, config, 4, COSTS)
    kinds = {(c.method, c.level, c.equal): evaluate.results.kinds_of(c.plan) for c in found}
    layers = {(method, "layer", equal): "01" for method in ("a", "even") for equal in ("kv_bytes", "ms")}
    assert kinds == layers | {("a", "head", "kv_bytes"): "01/10", ("a", "head", "ms"): "01/11"}
    assert {c.plan.native_windows for c in found} == {(48, None, 48, None)}
    assert {c.limit for c in found} == {(2 * 48 + 2000 + 36) * 2 * 64 * 2 * 4, 1.6}


@pytest.mark.parametrize("stop", ["scores by outside:reversed_layers", "plans x tasks"])
def test_an_interrupted_run_goes_on(model, tokenizer, here, monkeypatch, stop):
    given = settings(here, ratios=(1 / 3,), tasks=(evaluate.passkey,))
    compare(model, tokenizer, given, here / "whole")
    seen = []

    def interrupt(what, done, total):
        seen.append(what)
        if what == stop and seen.count(stop) == (4 if stop.startswith("plans") else 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(model, tokenizer, given, here / "out", interrupt)
    assert not (here / "out" / "compare.csv").exists()
    done = evaluate.read(here / "out" / "rows.csv") if stop.startswith("plans") else []
    calls, measured = [], []
    monkeypatch.setattr(run, "identify", lambda *args, **options: calls.append(args[2]) or zz.identify(*args, **options))
    monkeypatch.setattr(run.evaluate, "append", lambda path, rows: measured.extend(rows) or evaluate.results.append(path, rows))
    compare(model, tokenizer, given, here / "out")
    assert calls == ([] if done else ["outside:reversed_layers"])
    names = [file.name for file in (here / "out").iterdir()]
    assert sorted(names) == sorted(file.name for file in (here / "whole").iterdir())
    for name in ("compare.csv", "overlap.csv", "rows.csv"):
        assert (here / "out" / name).read_bytes() == (here / "whole" / name).read_bytes()
    cells = [row.cell for row in evaluate.read(here / "out" / "rows.csv")]
    assert len(set(cells)) == len(cells) == len(done) + len(measured) and len(done) == (3 if stop.startswith("plans") else 0)

    calls.clear()
    (here / "outside.py").write_text(OWN.format(last=0.25) + "# edited\n")
    forget()
    lines, _ = compare(model, tokenizer, given, here / "out")
    assert calls == ["outside:reversed_layers"]
    assert {line.kinds for line in lines if (line.method, line.level) == ("outside:reversed_layers", "layer")} == {"110"}


def test_a_prompt_that_is_too_short_is_found_out_first(model, tokenizer, here):
    given = settings(here, lengths=(500, 20), tasks=(evaluate.passkey,))
    with pytest.raises(ValueError, match="needs at least .* tokens, got 20"):
        compare(model, tokenizer, given, here / "out", lambda *_: pytest.fail("it was begun"))
    assert not (here / "out").exists()


def test_a_folder_is_for_one_model_and_one_set_of_depths(model, tokenizer, here):
    given = settings(here, ratios=(1 / 3,), tasks=(evaluate.passkey,), methods=["even"], levels=("layer",))
    compare(model, tokenizer, given, here / "out")
    with pytest.raises(ValueError, match=r"holds a comparison of depths \[0.0, 1.0\], not .0.5.: give another folder"):
        compare(model, tokenizer, settings(here, depths=(0.5,)), here / "out")
    record = json.loads((here / "out" / "run.json").read_text())
    record["of"]["first_weights"] += 1
    (here / "out" / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="holds a comparison of first_weights"):
        compare(model, tokenizer, given, here / "out")
    (here / "out" / "run.json").write_text("[]")
    with pytest.raises(ValueError, match="run.json is not the record of a comparison"):
        compare(model, tokenizer, given, here / "out")


def test_the_command_times_layers_and_draws(model_folder, here, drawn):  # noqa: F811
    places = ["--length", 500, "--depth", 0, "--depth", 1, "--prompts", 1, "--device", "cpu", *READING]
    methods = ["--method", "outside:reversed_layers", "--method", "found.tsv", "--method", "even"]
    command = ["compare", model_folder, *methods, *places, "-r", 0.3, "-r", 0.7, "-o", "out"]
    result = zigzag(*command)
    assert result.exit_code == 0, result.output
    with (here / "out" / "compare.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 1 + 2 * 2 * (3 + 2)
    assert {line["ms_from"] for line in lines} == {f"measured: {machine_name(loading.check_device('cpu'))}"}
    shown = [line for line in result.output.splitlines() if "outside:reversed_layers" in line]
    assert len(shown) == 2 * 2 * 2 and lines[0]["ms_from"] in result.output
    names = {path.name for path in (here / "out").glob("*.png")}
    assert names == {"compare_passkey_exact.png", "compare_passkey_logprob.png", "compare_overlap.png"}
    assert len(drawn) == 3 and not [pair for figure in drawn for pair in collisions(figure)]
    before = {path.name: path.read_bytes() for path in (here / "out").glob("*.[cj]s*")}
    assert zigzag(*command, "--no-figures").exit_code == 0
    assert {path.name: path.read_bytes() for path in (here / "out").glob("*.[cj]s*")} == before
    assert (here / "out" / "scores" / "outside%3Areversed_layers.tsv").exists()
    assert figures.draw_all([], [], here) == []


def test_a_measured_cost_table_serves_every_level(model):
    table = measure_costs(model, 4, 32, 8000)
    assert table["context"] == [8000] and [len(table[name]) for name in ("retrieval", "streaming", "mixed")] == [1, 1, 1]
    assert table["retrieval"][0] > 3 * table["streaming"][0] > 0 and len(table["mixed"][0]) == KV_HEADS - 1
    for level in ("layer", "head"):
        plan = zz.solve(np.eye(LAYERS, KV_HEADS), ms=2 * table["retrieval"][0], costs=table, context=8000, level=level)
        assert 0 < plan.provenance["ms"] <= 2 * table["retrieval"][0] + 1e-4


BEFORE_LOADING = {
    "magic": "unknown method 'magic'; supported: lazy, retrieval, ablation, greedy, gates, even, package.module:function",
    "outside:": "must be written package.module:function",
    "nowhere.module:function": "cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
    "broken:function": "cannot be imported: ZeroDivisionError: division by zero",
    "outside:other": "outside has no other",
    "outside:np": "is a module, not a function",
    "outside:few": "cannot be called with (model, tokenizer, sink=, window=, seed=): ",
    "small.tsv": "small.tsv: scores are for 2 layers x 2 KV heads; the model has 3 layers x 2 KV heads of head_dim 64",
    "wild.tsv": "lies outside [0, 1]",
}
OPTIONS = [
    (["--ratio", 1.5], "a ratio must lie in [0, 1], got 1.5"),
    (["--depth", 1.5], "a depth must lie in [0, 1], got 1.5"),
    (["--level", "token"], "unknown level 'token'; supported: layer, head"),
    (["--equal", "flops"], "unknown budget 'flops'; supported: kv_bytes, ms"),
    (["--task", "magic"], "unknown task 'magic'"),
    (["--length", 4000], "4000 tokens are more than the model's context of 3072"),
    (["--method", "even", "--method", "even"], "which must differ: ['even', 'even']"),
    (["--method", "even", "--level", "head"], "even spreads whole layers"),
    (["--costs", "whole.json", "--context", 2000], "missing mixed"),
    (["--costs", "costs.json", "--context", 100], "it covers contexts 2000 to 2000, not 100"),
    (["--ratio", 0.5, "--ratio", 0.5], "ratios must be one or more different values"),
    (["--window", 0], "window must be at least 1, got 0"),
    (["-o", "found.tsv"], "File exists"),
    (["--device", "tpu"], "unknown device 'tpu'"),
]


@pytest.mark.parametrize(
    "arguments, message", [(["--method", name], text) for name, text in BEFORE_LOADING.items()] + OPTIONS, ids=str
)
def test_errors_come_before_the_model_is_loaded(model_folder, here, monkeypatch, arguments, message):
    (here / "broken.py").write_text("1 / 0\n")
    with (here / "outside.py").open("a") as file:
        file.write("def few(model): pass\n")
    zz.save_scores(np.eye(2), here / "small.tsv")
    (here / "wild.tsv").write_text("0.1\t7\n" * 3)
    (here / "whole.json").write_text(json.dumps({name: value for name, value in COSTS.items() if name != "mixed"}))
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("the model was loaded"))
    command = ["compare", model_folder, *arguments, *([] if "--method" in arguments else ["--method", "found.tsv"])]
    assert message in failure(*command, *([] if "-o" in arguments else ["-o", "out"]))


RETURNED = {
    "np.ones((2, 3))": "must return scores [3, 2], a row per full-attention layer and a column per KV head; got [2, 3]",
    "np.ones(6)": "got [6]",
    "np.full((3, 2), np.nan)": "must return numbers in [0, 1], got nan at layer 0, KV head 0 and 5 more",
    "[[0, 1], [0, 2], [0, 1]]": "got 2 at layer 1, KV head 1",
    "[['a', 'b']] * 3": "must return numbers, got list",
    "[[1], [1, 2], [3]]": "returned no matrix",
    "None": "must return numbers, got NoneType",
    "{}['missing']": "failed: KeyError: 'missing'",
}


@pytest.mark.parametrize("expression, message", RETURNED.items(), ids=RETURNED)
def test_what_a_method_returns_is_checked(model, tokenizer, here, expression, message):
    (here / "outside.py").write_text(
        f"import numpy as np\ndef method(model, tokenizer, **_):\n    model.train()\n    return {expression}\n"
    )
    with pytest.raises(ValueError) as caught:
        zz.identify(model, tokenizer, "outside:method", output=here / "scores.tsv")
    assert "method 'outside:method'" in str(caught.value) and message in str(caught.value)
    assert not (here / "scores.tsv").exists() and not model.training


def test_identify_takes_a_function(model, tokenizer, model_folder, here):
    (here / "outside.py").write_text(
        "import torch\ndef method(model, tokenizer, *, sink, window, seed, tokens=7):\n"
        "    model.set_attn_implementation('eager')\n"
        "    return torch.full((3, 2), (sink + tokens + seed) / 100, dtype=torch.bfloat16)\n"
    )
    options = ["--sink", 4, "--seed", 9, "--tokens", 12, "--device", "cpu", "-o", "scores.tsv"]
    result = zigzag("identify", model_folder, "--method", "outside:method", *options)
    assert result.exit_code == 0, result.output
    scores = zz.load_scores(here / "scores.tsv")
    assert (scores == 0.25).all() and scores.origin["method"] == "outside:method" and scores.origin["head_dim"] == 64
    assert (zz.identify(model, tokenizer, "outside:method") == zz.identify(model, tokenizer, "outside:method", tokens=7)).all()
    assert model.config._attn_implementation != "eager"
    refused = failure("identify", model_folder, "--method", "outside:method", "--level", "head")
    assert "cannot be called with (model, tokenizer, sink=, window=, seed=, level=)" in refused
