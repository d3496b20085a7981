"""The evidence run from end to end on a tiny random model: plans, resuming, budget, report."""

import json

import numpy as np
import pytest
from character_model import KV_HEADS, LAYERS, one_thread  # noqa: F401

import zigzag_ext as zz
from zigzag_ext.study import evaluate

pytest.importorskip("matplotlib")

from benchmarks import evidence, solver_table
from benchmarks.cells import evidence_plans
from benchmarks.cells.evidence_plans import OBJECTIVES, all_plans, canonical, distinct
from benchmarks.report import evidence as evidence_report

SMALL = ["--device", "cpu", "--lengths", 420, 500, "--prompts", 10, "--ratios", 0.5, "--identify-tokens", 1600]
SMALL += ["--identify-prompts", 2]


@pytest.fixture(autouse=True)
def few_random_plans(monkeypatch):
    monkeypatch.setattr(evidence_plans, "RANDOM_SEEDS", 1)


def run(model_folder, results, *options):
    return evidence.main([str(x) for x in ("--model", model_folder, "--results", results, *SMALL, *options)])


def test_all_plans_have_the_budget_they_name():
    scores = {"a": np.random.default_rng(0).random((12, 2)), "b": np.repeat(np.linspace(0, 1, 12)[:, None], 2, 1)}
    named = list(all_plans(scores, 12, 2, [0.5, 0.25], 4, 8))
    assert len(named) == 2 + 2 * (1 + 1 + 2 * (1 + len(OBJECTIVES)))
    assert len({each.name for each in named}) == len(named)
    for each in named:
        kept = each.plan.retrieval_ratio
        assert kept == pytest.approx(1 - each.ratio)
        assert (each.plan.sink, each.plan.window) == (4, 8)
    only = distinct(named)
    kinds = [canonical(each.kinds) for each in only]
    assert len(set(kinds)) == len(kinds) < len(named) and set(kinds) == {canonical(each.kinds) for each in named}
    assert [each.rule for each in only[:3]] == ["full", "streaming", "even"]
    assert not any(each.source == "b" and each.rule == "heads" for each in only)  # these are whole layers


def test_a_run_a_second_run_and_its_report(model_folder, tmp_path, capsys):
    results = tmp_path / "results"
    assert run(model_folder, results, "--methods", "lazy", "ablation_heads", "--plans", "full", "even") == 0
    assert {row.plan for row in evaluate.read(results / "rows.csv")} == {"full-0%", "even-50%"}
    assert run(model_folder, results, "--methods", "lazy", "ablation_heads") == 0
    rows = evaluate.read(results / "rows.csv")
    cells = {row.cell for row in rows}
    assert len(cells) == len(rows)
    scores = {name: zz.load_scores(results / "head_scores" / f"{name}.tsv") for name in ("lazy", "ablation_heads")}
    plans = distinct(list(all_plans(scores, LAYERS, KV_HEADS, [0.5], evidence.SINK, evidence.WINDOW)))
    tasks = [("passkey", 420), ("passkey", 500), ("multikey", 500), ("multivalue", 500), ("perplexity", 500)]
    assert len(rows) == len(plans) * len(tasks)
    assert [(row.task, row.length) for row in rows[:5]] == tasks and {row.prompts for row in rows} == {10, 5}
    assert [json.loads(line)["model"] for line in (results / "runs.jsonl").read_text().splitlines()] == ["tiny", "tiny"]

    capsys.readouterr()
    assert run(model_folder, results, "--methods", "lazy", "ablation_heads") == 0
    assert evaluate.read(results / "rows.csv") == rows and "passkey" not in capsys.readouterr().out

    page = tmp_path / "evidence.md"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*evidence_report.markers(evidence_report.NAME)))
    assert evidence_report.write(results, page) == 0
    text = page.read_text()
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"evidence_exact.png", "evidence_logprob.png"}
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    for words in ("full", "all streaming", "lazy, mean", "lazy, per head", "random", "ablation_heads, transport", "passkey 500"):
        assert words in text
    page.write_text("no markers")
    assert evidence_report.write(results, page) == 1
    assert evidence_report.write(tmp_path, page) == 1


def test_the_budget_stops_a_run_and_the_next_one_goes_on(model_folder, tmp_path, monkeypatch):
    """A clock that jumps by a second per look: the first run ends among the scores, the second among the plans."""
    now = iter(range(10**9))
    monkeypatch.setattr(evidence.time, "monotonic", lambda: next(now))
    sizes = []
    for budget in (3, 25, None):
        options = [] if budget is None else ["--budget-seconds", budget]
        assert run(model_folder, tmp_path, "--methods", "retrieval", *options) == 0
        path = tmp_path / "rows.csv"
        sizes.append(len(evaluate.read(path)) if path.exists() else 0)
    assert sizes[0] == 0 < sizes[1] < sizes[2]
    rows = evaluate.read(tmp_path / "rows.csv")
    assert len({row.cell for row in rows}) == len(rows)


def test_scores_of_other_prompts_are_replaced_and_a_failing_method_stops_no_other(model_folder, tmp_path, monkeypatch, capsys):
    folder, identify = tmp_path / "head_scores", zz.identify
    folder.mkdir()
    old = np.tile([0.0, 1.0], (LAYERS, 1))
    zz.save_scores(old, folder / "retrieval.tsv")  # without a note: of unknown prompts
    zz.save_scores(old, folder / "greedy.tsv")
    (folder / "origins.json").write_text(json.dumps({"greedy": {"data": evidence.VERSION - 1}}))

    def failing(model, tokenizer, method, **options):
        if method == "greedy":
            raise RuntimeError("out of memory")
        return identify(model, tokenizer, method, **options)

    methods = ("--methods", "greedy", "retrieval")
    with monkeypatch.context() as patch:
        patch.setattr(zz, "identify", failing)
        assert run(model_folder, tmp_path, *methods) == 1
    printed = capsys.readouterr()
    assert "without ['greedy']" in printed.out and "out of memory" in printed.err
    found = zz.load_scores(folder / "retrieval.tsv")
    assert not np.array_equal(found, old) and not (folder / "greedy.tsv").exists()
    assert "greedy" not in (tmp_path / "plans.csv").read_text()

    assert run(model_folder, tmp_path, *methods) == 0
    assert np.array_equal(zz.load_scores(folder / "retrieval.tsv"), found)
    assert not np.array_equal(zz.load_scores(folder / "greedy.tsv"), old) and "greedy" in (tmp_path / "plans.csv").read_text()
    origins = json.loads((folder / "origins.json").read_text())
    assert {name: origin["data"] for name, origin in origins.items()} == dict.fromkeys(methods[1:], evidence.VERSION)
    assert (origins["greedy"]["tokens"], origins["greedy"]["prompts"], origins["greedy"]["model"]) == (1600, 2, "tiny")


def test_report_pools_prompts(model, tokenizer):
    rows = zz.evaluate.passkey(model, tokenizer, lengths=[600, 700], depths=[0.5], prompts=4)
    assert evidence_report.exact([]) == evidence_report.NONE
    assert evidence_report.exact(rows) == "0 [0, 32]"
    mean = (rows[0].logprob + rows[1].logprob) / 2
    half = ((rows[0].logprob_high - rows[0].logprob) ** 2 + (rows[1].logprob_high - rows[1].logprob) ** 2) ** 0.5 / 2
    assert evidence_report.logprob(rows) == f"{mean:.3f} ± {half:.3f}"


def test_the_solver_table(tmp_path):
    scores = np.array([[1.0, 0.0], [0.6, 0.6], [0.2, 0.3], [0.1, 0.2]])
    zz.save_scores(scores, tmp_path / "model")
    [*_, line] = solver_table.solver_table([tmp_path / "model"]).splitlines()
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    kept = (1.0 + 0.6 + 0.6 + 0.3) / 3.0, (1.0 + 1.2) / 3.0  # four heads; layers 0 and 1
    assert cells[:4] == ["model", "4 x 2", f"{kept[0]:.3f}", f"{kept[1]:.3f}"]
    assert cells[8:] == ["2 of 4", "0 layers"]
