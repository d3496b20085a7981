"""`zigzag identify`, `eval` and `plot` on a tiny model, and the figures."""

import re
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
from typer.testing import CliRunner

import zigzag_ext as zz
from zigzag_ext.cli.app import console
from zigzag_ext.cli.main import app
from zigzag_ext.study import evaluate, plots
from zigzag_ext.study.evaluate.scoring import Verdict

from .conftest import KV_HEADS, LAYERS


def zigzag(*arguments):
    with patch.object(console, "_width", 200):  # it took the width of the terminal when it was made
        return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def failure(*arguments) -> str:
    result = zigzag(*arguments)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]


def test_identify_solve_eval_plot(model, tokenizer, model_folder, tmp_path):
    scores, plan, rows = tmp_path / "scores.tsv", tmp_path / "third.json", tmp_path / "rows.csv"
    options = ["--tokens", 1600, "--prompts", 2, "--seed", 3, "--sink", 4, "--window", 32, "--device", "cpu"]
    result = zigzag("identify", model_folder, "--method", "ablation", "--level", "head", "-o", scores, *options)
    assert result.exit_code == 0, result.output
    expected = zz.identify(model, tokenizer, "ablation", level="head", tokens=1600, prompts=2, seed=3, sink=4, window=32)
    assert np.array_equal(zz.load_scores(scores), expected) and expected.shape == (LAYERS, KV_HEADS)
    assert f"highest layers: {expected.mean(1).argmax()} " in result.output

    recorded = zz.load_scores(scores).origin
    assert (recorded["model"], recorded["method"], recorded["head_dim"]) == (str(model_folder), "ablation", 64)
    assert zigzag("solve", scores, "-o", plan, "--retrieval-layers", 1, "--sink", 4, "--window", 32).exit_code == 0
    assert zz.Plan.load(plan).origin == recorded
    places = ["--length", 500, "--length", 600, "--depth", 0, "--depth", 1, "--prompts", 2, "--device", "cpu"]
    result = zigzag("eval", model_folder, "--plan", plan, "--task", "passkey", "--task", "perplexity", *places, "-o", rows)
    assert result.exit_code == 0, result.output
    written = evaluate.read(rows)
    assert len(written) == 2 * (2 * 2 + 2)
    again = evaluate.passkey(model, tokenizer, zz.Plan.load(plan), lengths=[500, 600], depths=[0.0, 1.0], prompts=2, name="third")
    found = [row for row in written if (row.plan, row.task) == ("third", "passkey")]
    assert [row.logprob for row in found] == pytest.approx([row.logprob for row in again], rel=1e-5)
    shown = re.search(r"third +passkey +500 +4 +(\d+)% +(-[\d.]+)", result.output)
    assert float(shown[2]) == pytest.approx((again[0].logprob + again[1].logprob) / 2, abs=1e-3)

    formats = ["--kv-format", "int4", "--ring-kv-format", "int8", "--key-smoothing"]
    result = zigzag("eval", model_folder, "--plan", plan, "--no-full", *places, *formats, "-o", tmp_path / "int4.csv")
    assert result.exit_code == 0, result.output
    coarse = zz.Plan.load(plan).with_formats("int4", "int8", True)
    again = evaluate.passkey(model, tokenizer, coarse, lengths=[500, 600], depths=[0.0, 1.0], prompts=2)
    scored = [row.logprob for row in evaluate.read(tmp_path / "int4.csv")]
    assert scored == pytest.approx([row.logprob for row in again], rel=1e-5)
    assert scored != pytest.approx([row.logprob for row in found], rel=1e-5)

    pytest.importorskip("matplotlib")
    result = zigzag("plot", rows, "-o", tmp_path / "figures")
    assert result.exit_code == 0, result.output
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {"passkey_exact.png", "passkey_logprob.png"}


def test_eval_reports_what_a_draft_keeps(model, tokenizer, model_folder, tmp_path):
    plan = zz.Plan(["retrieval"] + ["streaming"] * (LAYERS - 1), sink=4, window=32)
    plan.save(tmp_path / "one.json")
    options = ["--length", 500, "--depth", 0.5, "--prompts", 2, "--no-full", "--device", "cpu", "--new-tokens", 12]
    result = zigzag("eval", model_folder, "--plan", tmp_path / "one.json", *options, "--speculate", "streaming")
    assert result.exit_code == 0, result.output
    report = evaluate.accepted(model, evaluate.passkey.samples(tokenizer, 500, [0.5], 2), plan, "streaming", 12)
    drafted, kept = sum(report.drafted.values()), report.acceptance()
    assert (report.tokens, report.prompts) == (24, 2) and report.rounds <= 22
    assert re.search(rf"one +passkey +500 +{drafted} +{kept:.0%} +{report.tokens_per_round:.2f}", result.output), result.output
    with pytest.raises(ValueError, match="got none"):
        evaluate.accepted(model, [], plan, "streaming", 12)


def test_eval_under_a_compression(model, tokenizer, model_folder, tmp_path):
    plan, rows = tmp_path / "third.json", tmp_path / "less.csv"
    zz.Plan(["streaming"] * (LAYERS - 1) + ["retrieval"], sink=4, window=32).save(plan)
    compress = ["--compress", 90, "--compress-observe", 8, "--compress-window", 4]
    places = ["--length", 500, "--length", 600, "--depth", 0, "--depth", 1, "--prompts", 2, "--device", "cpu"]
    result = zigzag("eval", model_folder, "--plan", plan, *places, *compress, "-o", rows)
    assert result.exit_code == 0 and "third, windows 90 observe=8 window=4" in result.output, result.output
    method = zz.PromptWindows(budget=90, observe=8, window=4)
    options = {"lengths": [500, 600], "depths": [0.0, 1.0], "prompts": 2, "compress": method}
    again = evaluate.passkey(model, tokenizer, zz.Plan.load(plan), **options)
    scored = {name: [row for row in evaluate.read(rows) if row.plan == name] for name in ("full", "third")}
    assert [row.logprob for row in scored["third"]] == pytest.approx([row.logprob for row in again], rel=1e-5)
    assert {row.compress for row in scored["third"]} == {str(method)} and {row.compress for row in scored["full"]} == {""}
    assert "needs a --plan" in failure("eval", model_folder, *compress)
    assert "need --compress" in failure("eval", model_folder, "--plan", plan, "--compress-method", "recent")


def test_identify_passes_the_options_of_greedy(model_folder, tmp_path):
    options = ["--tokens", 1600, "--prompts", 1, "--sink", 4, "--window", 32, "--device", "cpu", "-o", tmp_path / "scores.tsv"]
    assert f"between 1 and {LAYERS - 1}" in failure("identify", model_folder, "--method", "greedy", "--keep", LAYERS, *options)
    result = zigzag("identify", model_folder, "--method", "greedy", "--keep", 2, "--exhaustive", *options)
    assert result.exit_code == 0, result.output
    assert sorted(zz.load_scores(tmp_path / "scores.tsv")[:, 0]) == [0.0, 0.5, 1.0]


def test_expected_failures_are_one_line(model_folder, tmp_path):
    device = ["--device", "cpu"]
    assert "lazy, retrieval" in failure("identify", model_folder, "--method", "magic", *device)
    assert "no option level" in failure("identify", model_folder, "--level", "head", *device)
    assert "no option keep" in failure("identify", model_folder, "--keep", 2, *device)
    assert "no option exhaustive" in failure("identify", model_folder, "--exhaustive", *device)
    assert "context of 3072" in failure("identify", model_folder, "--tokens", 9000, *device)
    assert "folder" in failure("identify", model_folder, "-o", tmp_path / "none" / "x.tsv", "--tokens", 1600, *device)
    assert "passkey, multikey" in failure("eval", model_folder, "--task", "magic", *device)
    assert "at least" in failure("eval", model_folder, "--length", 10, *device)
    assert "not of ruler_vt" in failure("eval", model_folder, "--task", "ruler_vt", "--speculate", "auto", *device)
    wrong = tmp_path / "full.json"
    zz.Plan(["retrieval"] * LAYERS, sink=0, window=4).save(wrong)
    assert "told apart" in failure("eval", model_folder, "--plan", wrong, *device)
    zz.Plan(["retrieval"] * 9, sink=0, window=4).save(tmp_path / "nine.json")
    assert "9 layers" in failure("eval", model_folder, "--plan", tmp_path / "nine.json", "--no-full", "--length", 500, *device)
    (tmp_path / "rows.csv").write_text("a,b\n")
    assert "columns" in failure("plot", tmp_path / "rows.csv", "-o", tmp_path)


def some_rows():
    """Full attention, and two methods at three budgets each, at two lengths and three depths."""
    rng = np.random.default_rng(0)
    plans = {"full": "0000"} | {f"{m}-{r}%": kinds for m in "ab" for r, kinds in ((25, "0001"), (50, "0011"), (75, "0111"))}
    rows = []
    for name, kinds in plans.items():
        for length in (1024, 2048):
            for depth in (0.1, 0.5, 0.9):
                verdicts = [Verdict(bool(rng.random() < 0.7), -rng.random(), ()) for _ in range(8)]
                what = {"model": "m", "device": "cpu", "dtype": "float32", "task": "passkey", "plan": name, "kinds": kinds}
                rows.append(
                    evaluate.Row(
                        **what,
                        sink=4,
                        window=8,
                        compress="",
                        length=length,
                        depth=depth,
                        seed=0,
                        **evaluate.results.statistics(verdicts),
                    )
                )
    return rows


def test_figures_have_ink_and_series_the_right_points(tmp_path):
    imread = pytest.importorskip("matplotlib.image").imread
    rows = some_rows()
    written = plots.draw_all(rows, tmp_path / "new")
    assert {path.name for path in written} == {
        f"passkey_{quantity}{kind}.png" for quantity in ("exact", "logprob") for kind in ("", "_budget")
    }
    for path in written:
        image = imread(path)
        assert min(image.shape[:2]) > 300 and len(np.unique(image[..., :3].reshape(-1, 3), axis=0)) > 50
    series = plots.by_series(rows, "logprob")
    assert list(series) == ["full", "a", "b"] and [share for share, *_ in series["a"]] == [0.25, 0.5, 0.75]
    mine = [row for row in rows if row.plan == "b-50%"]
    share, value, low, high = series["b"][1]
    assert value == pytest.approx(np.mean([row.logprob for row in mine]))
    half = np.sqrt(sum((row.logprob_high - row.logprob) ** 2 for row in mine)) / len(mine)
    assert high - value == pytest.approx(half) == pytest.approx(value - low)
    assert plots.draw_all(rows[:1], tmp_path)  # one cell is a heat map
    assert not plots.draw_all([], tmp_path)


def test_files_named_by_their_ratio_make_one_curve():
    """plan25.json, plan50.json and plan75.json of `zigzag solve -r`; a name whose number says something else is its own."""
    names = {"full": "0000", "plan25": "0111", "plan50": "0011", "plan75": "0001", "v2": "0101", "half": "1100"}
    rows = [replace(row, plan=name, kinds=kinds) for name, kinds in names.items() for row in some_rows()[:2]]
    series = plots.by_series(rows, "exact")
    assert {name: [share for share, *_ in points] for name, points in series.items()} == {
        "full": [1.0],
        "plan": [0.25, 0.5, 0.75],
        "v2": [0.5],
        "half": [0.5],
    }
    again = plots.by_series([*rows, *(replace(row, compress="windows 0.12") for row in rows if row.plan == "plan25")], "exact")
    assert again["plan, windows 0.12"] == [again["plan"][0]]
    assert set(plots.by_series([replace(rows[0], model=model) for model in "ab"], "exact")) == {"full, a", "full, b"}


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are when they are saved, not closed."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures, save = [], plots.save

    def keep(figure, path):
        with patch.object(pyplot, "close"):
            save(figure, path)
        figures.append(figure)

    monkeypatch.setattr(plots, "save", keep)
    yield figures
    pyplot.close("all")


def collisions(figure) -> list:
    """Titles, axis labels and legends that stand on one another."""
    figure.draw_without_rendering()
    parts = [figure._suptitle, *figure.legends]
    parts += [text for axis in figure.axes for text in (axis.title, axis.xaxis.label, axis.yaxis.label) if text.get_text()]
    boxes = [part.get_window_extent() for part in parts]
    return [(parts[i], parts[k]) for i in range(len(boxes)) for k in range(i) if boxes[i].overlaps(boxes[k])]


def test_many_plans_with_long_names_are_told_apart(drawn, tmp_path):
    """Every line has a look of its own, no text is cropped or stands on another one, and the title tells the conditions."""
    imread = pytest.importorskip("matplotlib.image").imread
    names = [f"a-method-with-a-name-that-goes-on-and-on.number:{i}" for i in range(11)]
    ratios = ((25, "0111"), (50, "0011"), (75, "0001"))
    rows = [replace(row, plan=f"{name}-{r}%", kinds=kinds) for name in names for r, kinds in ratios for row in some_rows()[:6]]
    rows = [row if row.plan.startswith(names[0]) else replace(row, depth=None) for row in rows]  # few panels: it is quicker
    written = plots.draw_all([*some_rows()[:6], *rows], tmp_path)
    assert len(drawn) == len(written) == 4
    for figure, path in zip(drawn, written, strict=True):
        image = imread(path)[..., :3]
        edges = (image[0], image[-1], image[:, 0], image[:, -1])
        assert all((edge == 1.0).all() for edge in edges), path.name
        title = figure.get_suptitle().replace("\n", " ")
        sizes = ("1,024, 2,048 tokens", "24 prompts each", "sink + window 4 + 8", "95% intervals")
        for part in ("passkey: ", "m, float32, cpu", *sizes):
            assert part in title, title
        assert not collisions(figure), path.name
    looks = [(line.get_color(), str(line.get_linestyle()), line._dash_pattern) for line in drawn[1].axes[0].get_lines()]
    looks = [look for look in looks if look[1] != "None"]
    assert len(looks) == len({str(look) for look in looks}) == 12


def test_shares_of_curves_are_those_of_the_plans(drawn, tmp_path):
    rows = some_rows()
    plots.curves(plots.by_series(rows, "exact"), "exact", tmp_path / "curves.png", ("passkey", plots.conditions(rows)))
    [axis] = drawn[0].axes
    assert axis.get_xlabel() == "layers that retrieve, %" and axis.get_ylabel() == "exact matches, %"
    lines = {container.get_label(): container.lines[0].get_xdata() for container in axis.containers}
    assert list(lines) == ["a", "b"]
    for shift, xs in zip((-0.3, 0.3), lines.values(), strict=True):
        assert xs == pytest.approx([25 + shift, 50 + shift, 75 + shift])
