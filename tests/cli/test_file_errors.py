"""The command on files that are damaged, hostile or strangely named: one line on standard error, exit code 2, no traceback."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console
from test_cli import failure, model_folder, zigzag  # noqa: F401  a fixture
from typer.testing import CliRunner

import zigzag_ext as zz
from zigzag_ext.cli import app as app_module
from zigzag_ext.cli import commands, demo
from zigzag_ext.cli.main import app
from zigzag_ext.planning import writing
from zigzag_ext.study import evaluate, plots

PLAN = zz.Plan(["retrieval", "streaming"], sink=4, window=8)
MARKUP = "a[/b][red].tsv"


def a_row(**changes) -> list[str]:
    values = {
        "model": "m", "device": "cpu", "dtype": "float32", "task": "passkey", "plan": "p", "kinds": "01", "sink": "4",
        "window": "8", "compress": "", "length": "100", "depth": "0.5", "seed": "0", "prompts": "2", "exact": "0.5",
        "exact_low": "0.1", "exact_high": "0.9", "logprob": "-1", "logprob_low": "-2", "logprob_high": "0",
    }  # fmt: skip
    return list((values | changes).values())


def table(path, *rows):
    path.write_text("".join(",".join(row) + "\n" for row in [evaluate.results.COLUMNS, *rows]))
    return path


def test_markup_in_names_is_shown_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a[", "["):  # the slash of a closing tag makes a folder of what is before it
        (tmp_path / folder).mkdir()
    np.savetxt(MARKUP, [[0.9], [0.1]])
    result = zigzag("solve", MARKUP, "-o", "[/x]plan[red].json")
    assert result.exit_code == 0, result.output
    assert f"{MARKUP}: 2 layers" in result.stdout and "wrote [/x]plan[red].json" in result.stdout
    zz.Plan(PLAN.kinds, sink=4, window=8, provenance={"[/b]": "[/red]:smile:"}).save("n.json")
    assert "[/b]       [/red]:smile:" in zigzag("info", "n.json").stdout
    assert f"no scores at b{MARKUP}" in failure("solve", "b" + MARKUP)


def test_markup_in_tables_and_progress(tmp_path, monkeypatch):
    """Plan names and tasks come from files; the progress line shows a method that is not yet known to exist."""
    screen = Console(file=open(tmp_path / "screen", "w+"), force_terminal=True, markup=app_module.console._markup, width=200)  # noqa: SIM115
    from zigzag_ext.cli import progress, study

    monkeypatch.setattr(progress, "screen", screen)
    screen.print(study._table([evaluate.results._row(a_row(plan="x[/b]", task="t[red]"))]))
    with progress.waiting("a[/b]"):
        pass
    screen.file.seek(0)
    text = screen.file.read()
    assert "x[/b]" in text and "t[red]" in text and "a[/b]" in text


@pytest.mark.parametrize("changes, message", [
    ({"kinds": ""}, "kinds must be 0 or 1 per layer"),
    ({"kinds": "0a"}, "kinds must be"),
    ({"kinds": "01/"}, "kinds must be"),
    ({"length": "0"}, "length must be an integer from 1"),
    ({"length": "9" * 5000}, "length must be a number, got '999"),
    ({"length": "1" * 300}, "length must be an integer from 1 to 2^53"),
    ({"depth": "nan"}, "depth must be from 0 to 1"),
    ({"exact": "2"}, "exact must be from 0 to 1"),
    ({"logprob": "1e300"}, "logprob must be nan, inf or within 1e9"),
    ({"plan": "a\x1b[2J"}, "plan must be 1 to 1000 printable"),
    ({"model": "m" * 200_000}, "rows.csv:2: not a line of a CSV file: field larger"),
    ({"logprob_high": "0,1"}, "20 values, expected 19"),
    ({"logprob_high": '"0'}, "unexpected end of data"),
])  # fmt: skip
def test_plot_of_rows_that_no_evaluation_wrote(tmp_path, changes, message):
    path = table(tmp_path / "rows.csv", a_row(**changes))
    error = failure("plot", path, "-o", tmp_path / "figures")
    assert message in error and f"{path}:2: " in error
    assert not (tmp_path / "figures").exists()


def test_plot_stays_in_its_folder(tmp_path, monkeypatch):
    tasks = ["../../x", "/abs", "..", ".", "a/b", "a_b", "a b", "%2F"]
    monkeypatch.setattr(plots, "heat_maps", lambda rows, quantity, path: path.write_bytes(b"") or path)
    path = table(tmp_path / "rows.csv", *(a_row(task=task) for task in tasks))
    before = set(tmp_path.rglob("*"))
    result = zigzag("plot", path, "-o", tmp_path / "deep" / "figures")
    assert result.exit_code == 0, result.output
    new = set(tmp_path.rglob("*")) - before - {tmp_path / "deep", tmp_path / "deep" / "figures"}
    assert {file.parent for file in new} == {tmp_path / "deep" / "figures"}
    assert len(new) == 2 * len(tasks) and not any(file.is_dir() for file in new)


def test_figures_take_names_as_text_and_are_whole_or_not_there(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    path = table(tmp_path / "rows.csv", a_row(task="$\\frac{$", plan="$x_{$"))
    assert zigzag("plot", path, "-o", tmp_path / "figures").exit_code == 0
    figures = {file: file.read_bytes() for file in (tmp_path / "figures").iterdir()}
    monkeypatch.setattr(writing.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "is as it was: No space left" in failure("plot", path, "-o", tmp_path / "figures")
    assert len(figures) == 2 and {file: file.read_bytes() for file in (tmp_path / "figures").iterdir()} == figures


def test_plot_of_too_much(tmp_path):
    pytest.importorskip("matplotlib")
    path = table(tmp_path / "rows.csv", *(a_row(length=str(i + 1)) for i in range(200)))
    assert "200 lengths are more than a figure has room for" in failure("plot", path, "-o", tmp_path)
    path = table(tmp_path / "rows.csv", *(a_row(plan=f"p{i}") for i in range(200)))
    assert "200 plans are more than" in failure("plot", path, "-o", tmp_path)


def test_info_of_any_content(tmp_path):
    content = json.loads('{"format": "zigzag-plan", "version": 1, "kinds": ["retrieval"], "sink": 0, "window": 1}')
    content["provenance"] = {"layer_values": [10**400], "name": "\udc80\x1b[2J", "deep": {"a": {"b": [[]]}}}
    (tmp_path / "p.json").write_text(json.dumps(content))
    result = zigzag("info", tmp_path / "p.json")
    assert result.exit_code == 0 and "\x1b" not in result.output and "\\x1b[2J" in result.output, result.output


@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', b"{}", b"\0" * 100])
def test_solve_and_info_of_damaged_files(tmp_path, content):
    for name in ("s.tsv", "s.csv", "s.npy", "s.pt"):
        (tmp_path / name).write_bytes(content)
        assert str(tmp_path / name) in failure("solve", tmp_path / name, "-o", tmp_path / "plan.json")
    assert str(tmp_path / "s.tsv") in failure("info", tmp_path / "s.tsv")
    np.savetxt(tmp_path / "good.tsv", [[0.9], [0.1]])
    options = ["solve", tmp_path / "good.tsv", "-o", tmp_path / "plan.json", "--ms", 1]
    assert str(tmp_path / "s.csv") in failure(*options, "--costs", tmp_path / "s.csv")
    assert not (tmp_path / "plan.json").exists()


def test_names_that_are_not_utf8(tmp_path):
    """A name with a byte that is no character, in a real process with a terminal's strict encoding."""
    name = b"s\xff\xe2\x82\xac.tsv"
    with open(bytes(tmp_path) + b"/" + name, "wb") as file:
        file.write(b"0.9\n0.1\n")
    command = [sys.executable, "-m", "zigzag_ext", "solve", bytes(tmp_path) + b"/" + name, "-o", tmp_path / "p.json"]
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(command, capture_output=True, env={"PYTHONIOENCODING": encoding, "PATH": "/usr/bin"})
        assert done.returncode == 0 and b"\\udcff" in done.stdout and not done.stderr, done.stderr


def test_outputs_that_cannot_be_written_are_one_line(tmp_path):
    np.savetxt(tmp_path / "s.tsv", [[0.9], [0.1]])
    assert "is a folder" in failure("solve", tmp_path / "s.tsv", "-o", tmp_path)
    assert "No space left" in failure("solve", tmp_path / "s.tsv", "-o", "/dev/full")
    assert zigzag("solve", tmp_path / "s.tsv", "-o", "/dev/null").exit_code == 0
    table(tmp_path / "rows.csv", a_row())
    assert "File exists" in failure("plot", tmp_path / "rows.csv", "-o", tmp_path / "s.tsv")
    assert "is a folder, not a table" in failure("plot", tmp_path)


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    command = f'"{sys.executable}" -m zigzag_ext --help | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "rror" not in done.stderr


@pytest.mark.parametrize("file, content, message", [
    ("tokenizer.json", b'{"model": 3}', "the tokenizer of "),
    ("tokenizer.json", b"[]", "the tokenizer of "),
    ("tokenizer_config.json", b'{"tokenizer_class": 3}', "the tokenizer of "),
    ("config.json", b'{"model_type": "llama", "num_hidden_layers": "x"}', "cannot be read"),
    ("config.json", b'{"model_type": "llama", "num_attention_heads": 0}', "cannot be read"),
    ("generation_config.json", b"[]", "the model "),
    ("model.safetensors", b"\xff" * 100, "damaged or incomplete"),
])  # fmt: skip
def test_damaged_model_folders_are_named(model_folder, tmp_path, file, content, message):  # noqa: F811
    folder = shutil.copytree(model_folder, tmp_path / "damaged")
    (folder / file).write_bytes(content)
    error = failure("generate", folder, "-p", "w1", "--device", "cpu")
    assert message in error and str(folder) in error


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF\x03\0\0\0" + b"\xff" * 40])
def test_a_damaged_gguf_is_named(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    assert f"{tmp_path}/m.gguf cannot be read" in failure("generate", tmp_path / "m.gguf", "-p", "w1", "--device", "cpu")


def test_arithmetic_and_memory_errors_are_one_line(monkeypatch):
    for error in (OverflowError("too large"), MemoryError("1 TiB"), ZeroDivisionError("by zero")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(zz.Plan, "load", fail)
        assert str(error) in failure("info", "x.json")


def test_a_killed_conversion_of_the_demo_model_is_cleaned_up(tmp_path, monkeypatch):
    left = tmp_path / "zigzag_ext" / ".partial-left"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"x")

    def convert(folder, gguf):
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "_check_installed", lambda: None)
    monkeypatch.setattr(demo, "_convert_into", convert)
    assert demo.model_folder().parent == left.parent and not left.exists()


def test_the_demo_table_takes_text_as_text():
    console = Console(markup=False, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    generation = type("Generation", (), {"text": "[/b] answer"})
    plan = zz.Plan(["retrieval"], sink=0, window=1)
    outcome = type("Outcome", (), {"name": "full", "plan": plan, "generations": [generation], "hits": (True,), "cache_bytes": 1,
                                   "prefill_seconds": 1.0, "seconds_per_token": 1.0})  # fmt: skip
    with console.capture() as capture:
        console.print(commands._demo_table([outcome]))
    assert "[/b] answer" in capture.get() and "yes" in capture.get() and "[green]" not in capture.get()


def test_usage_errors_with_markup_have_no_traceback():
    result = CliRunner().invoke(app, ["solve", "x", "[/b]"])
    assert result.exit_code == 2 and "[/b]" in result.output and "Traceback" not in result.output
