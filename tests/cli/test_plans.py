"""`zigzag plans`: what it lists, what it writes, and one line for what it cannot do."""

import pytest
from typer.testing import CliRunner

import zigzag_ext as zz
from zigzag_ext.cli.main import app
from zigzag_ext.planning.gallery import entries


def zigzag(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80", "NO_COLOR": "1"})


def test_the_list_has_every_model_with_ratio_method_source_and_licence():
    result = zigzag("plans")
    assert result.exit_code == 0, result.output
    rows = [line.split(maxsplit=1) for line in result.output.splitlines()]
    for entry in entries():
        low, high = entry.ratios
        shown = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        texts = [row[1].split() for row in rows if row and row[0] == entry.model and len(row) > 1]
        assert [*shown.split(), entry.method, entry.source, *entry.licence.split()] in texts
        assert f"{entry.source}: {entry.score}; {entry.url}, {entry.version} of {entry.date}" in result.output
        assert all(name in result.output for name in (*entry.same, *entry.finetunes))


def test_the_plan_of_a_model_is_shown_and_written(tmp_path):
    model, path = "meta-llama/Llama-3.1-8B-Instruct", tmp_path / "plan.json"
    result = zigzag("plans", model, "-o", path, "-r", 0.25, "--source", "swaa", "--window", 512)
    assert result.exit_code == 0, result.output
    plan = zz.Plan.load(path)
    assert plan == zz.load_plan(model, 0.25, source="swaa", window=512) and len(plan.retrieval_layers) == 8
    assert plan.summary() in result.output and f"wrote {path}" in result.output
    shown = zigzag("plans", model)
    assert shown.exit_code == 0 and zz.load_plan(model).summary() in shown.output and "wrote" not in shown.output


@pytest.mark.parametrize(
    "arguments,message",
    [
        (("org/new",), "error: the gallery has no plan for 'org/new'; `zigzag plans` lists its models. To make scores: "),
        (
            ("-r", 0.5, "-o", "plan.json"),
            "error: --output, --retrieval-ratio needs a MODEL; `zigzag plans` alone lists the models",
        ),
        (("cxdu/QwQ-32B-LightTransfer", "-r", 0.3), "error: cxdu/QwQ-32B-LightTransfer has one published plan"),
    ],
)
def test_failures_are_one_line(arguments, message):
    result = zigzag("plans", *arguments)
    assert result.exit_code == 2 and result.stderr.startswith(message) and len(result.stderr.splitlines()) == 1
