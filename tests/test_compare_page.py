"""docs/compare.md and what its command has written, benchmarks/results/compare: one run, whose plans follow from its scores."""

import csv
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from character_model import KV_HEADS, LAYERS, model, one_thread, tokenizer  # noqa: F401
from transformers import LlamaConfig

import zigzag_ext as zz
from zigzag_ext.cli.main import app
from zigzag_ext.study import evaluate
from zigzag_ext.study.compare import Settings, choices, sources_of

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compare"
METHOD = "examples.methods.reach:reach"


@pytest.fixture
def options(monkeypatch):
    """What the page's command asks for, as the command line reads it."""
    monkeypatch.chdir(ROOT)
    [command] = re.findall(r"^zigzag compare (?:.*\\\n)*.*", (ROOT / "docs" / "compare.md").read_text(), re.MULTILINE)
    words = shlex.split(command.replace("\\\n", ""))
    return typer.main.get_command(app).commands["compare"].make_context("compare", words[2:], resilient_parsing=False).params


def lines() -> list[dict]:
    with (RESULTS / "compare.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_results_are_those_of_the_command(options):
    found = lines()
    assert {line["method"] for line in found} == {"full", *options["method"]} and METHOD in options["method"]
    methods, heads = len(options["method"]), len(options["method"]) - ("even" in options["method"])
    assert len(found) == 1 + len(options["ratio"]) * 2 * (methods + heads)
    for line in found:
        assert (line["task"], line["length"], line["seed"]) == ("passkey", *map(str, (*options["length"], options["seed"])))
        assert int(line["prompts"]) == options["prompts"] * len(options["depth"])
        sizes = ("0", "0") if line["method"] == "full" else (str(options["sink"]), str(options["window"]))
        assert (line["sink"], line["window"]) == sizes and line["ms_from"].startswith("measured: ")
    measured = {row.kinds: row for row in evaluate.read(RESULTS / "rows.csv")}
    for line in found:
        row = measured[line["kinds"]]
        for name in ("exact", "exact_low", "exact_high", "logprob", "logprob_low", "logprob_high"):
            assert float(line[name]) == pytest.approx(getattr(row, name), rel=1e-5)


def test_the_plans_follow_from_the_scores(options):
    """Every plan of compare.csv, recomputed from the committed scores and times."""
    scores = {source.label: source for source in sources_of(options["method"])}
    files = {path.name.replace("%3A", ":").removesuffix(".tsv"): path for path in (RESULTS / "scores").iterdir()}
    assert files.keys() == scores.keys() - {"even"}
    matrices = {name: zz.load_scores(files[name]) if name in files else None for name in scores}
    of = matrices["retrieval"].origin
    config = LlamaConfig(
        num_hidden_layers=of["layers"], num_attention_heads=of["query_heads"], num_key_value_heads=of["kv_heads"],
        head_dim=of["head_dim"], hidden_size=of["query_heads"] * of["head_dim"], max_position_embeddings=8192,
    )  # fmt: skip
    sizes = {name: options[name] for name in ("sink", "window")}
    settings = Settings(tuple(scores.values()), tuple(options["ratio"]), tasks=(evaluate.passkey,), **sizes)
    chosen = choices(matrices, settings, config, 4, RESULTS / "costs.json")
    made = {(c.method, c.level, c.equal, f"{c.ratio:g}"): evaluate.results.kinds_of(c.plan) for c in chosen}
    found = {(x["method"], x["level"], x["equal"], x["ratio"]): x["kinds"] for x in lines() if x["method"] != "full"}
    assert made == found


def test_the_method_outside_the_package_runs(model, tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.chdir(ROOT)
    scores = zz.identify(model, tokenizer, METHOD, sink=4, window=8, tokens=200, prompts=2)
    assert scores.shape == (LAYERS, KV_HEADS) and scores.min() > 0 and scores.max() < 1 and len(np.unique(scores)) > 1
    assert np.array_equal(scores, zz.identify(model, tokenizer, METHOD, sink=4, window=8, tokens=200, prompts=2))
    assert not np.array_equal(scores, zz.identify(model, tokenizer, METHOD, seed=1, sink=4, window=8, tokens=200, prompts=2))
