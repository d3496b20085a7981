"""The lines about what takes long: their text, and where there are none."""

import re

import pytest
from rich.console import Console
from test_cli import model_folder, plan_file, scores, zigzag  # noqa: F401  fixtures

from zigzag_ext.cli import progress


@pytest.fixture
def terminal(monkeypatch, tmp_path):
    """A terminal in the place of stderr; called, it returns all that was drawn on it."""
    file = open(tmp_path / "screen", "w+")  # noqa: SIM115
    monkeypatch.setattr(progress, "screen", Console(file=file, force_terminal=True, width=200, markup=False, emoji=False))
    monkeypatch.setenv("TERM", "xterm")

    def drawn() -> str:
        file.seek(0)
        return file.read()

    yield drawn
    progress.want(True)
    file.close()


@pytest.mark.parametrize("updates, seconds, expected", [
    ([], 3.4, "reading: 0:03"),
    ([(0, 20)], 61, "reading: 0 of 20, 1:01"),
    ([(0, 20), (5, 20)], 60, "reading: 5 of 20, 1:00, about 3:00 left"),
    ([(4, 20), (5, 20)], 60, "reading: 5 of 20, 1:00, about 15:00 left"),
    ([(0, 8), (2, 8)], 3600, "reading: 2 of 8, 1:00:00, about 3:00:00 left"),
    ([(0, 0)], 1, "reading: 0:01"),
])  # fmt: skip
def test_the_text_of_a_line(updates, seconds, expected):
    """What is left follows from what this run has done, not from what an interrupted one did before."""
    line = progress.Line("reading")
    for update in updates:
        line.update(*update)
    assert line.at(line.start + seconds) == expected


def test_a_step_is_timed_for_itself():
    line = progress.Line("both")
    line.step("first", 1, 4)
    line.step("first", 2, 4)
    line.start -= 60
    assert line.at(line.start + 60) == "first: 2 of 4, 1:00, about 2:00 left"
    line.step("second", 0, 3)
    assert line.at(line.start + 2) == "second: 0 of 3, 0:02"


def test_lines_stand_below_each_other_and_go(terminal):
    with progress.waiting("outer") as outer, progress.waiting("inner"):
        outer.say("other")
        assert str(progress._drawn()).splitlines() == ["other: 0:00", "inner: 0:00"]
    with pytest.raises(OSError), progress.waiting("failing"):
        raise OSError
    assert not progress._lines and not str(progress._drawn())
    text = terminal()
    assert "outer: 0:00" in text and "failing: 0:00" in text
    assert text.endswith("\x1b[2K") or text.endswith("\x1b[?25h\r\x1b[1A\x1b[2K")  # the last line is erased


def test_a_line_does_not_overwrite_text(terminal, monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True)
    progress.show("half a line")
    with progress.waiting("inner"):
        pass
    progress.show("\n")
    assert terminal().startswith("\n") and capsys.readouterr().out == "half a line\n"
    with progress.waiting("inner"):
        pass
    assert terminal().count("\n\x1b[?25l") == 1


SMALL = ["--tokens", 300, "--prompts", 2, "--sink", 4, "--window", 8, "--device", "cpu"]


def commands(folder, scores_file, plan, out):
    return {
        "identify": (
            ["identify", folder, "--method", "ablation", *SMALL, "-o", out / "s.tsv"],
            ["loading", "scoring heads by ablation"],
        ),
        "eval": (
            ["eval", folder, "--plan", plan, "--task", "perplexity", "--length", 50, "--prompts", 1, "--device", "cpu"],
            ["loading", "evaluating prompts: "],
        ),
        "solve": (["solve", scores_file, "-o", out / "p.json"], ["solving"]),
        "generate": (["generate", folder, "--plan", plan, "-p", "w1 w2", "-n", 2, "--device", "cpu"], ["loading"]),
    }


@pytest.mark.parametrize("name", ["identify", "eval", "solve", "generate"])
def test_commands_say_what_takes_long(name, model_folder, scores, plan_file, tmp_path, terminal):  # noqa: F811
    arguments, lines = commands(model_folder, scores, plan_file, tmp_path)[name]
    result = zigzag(*arguments)
    assert result.exit_code == 0, result.output
    text = terminal()
    assert all(line in text for line in lines) and re.search(r"\d:\d\d", text)
    assert not any(line in result.output for line in lines)
    assert zigzag("--quiet", *arguments).exit_code == 0 and terminal() == text


def test_without_a_terminal_there_are_no_lines(model_folder, scores, plan_file, tmp_path):  # noqa: F811
    for arguments, _ in commands(model_folder, scores, plan_file, tmp_path).values():
        result = zigzag(*arguments)
        assert result.exit_code == 0 and "loading" not in result.stderr and "solving" not in result.stderr, result.stderr
