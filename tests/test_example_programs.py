"""The programs in examples/, and the notebook there: each runs on the demo's model, and prints what it should."""

import contextlib
import io
import json
import re
import runpy

import pages
import pytest

EXAMPLES = pages.ROOT / "examples"
PARIS = "The capital of France is Paris."
QUESTIONS = "What is the capital of France?\nAnd of Italy?\n\nnever asked\n"
# What each program prints, as a regular expression.
PRINTED = {
    "batch": rf"'{PARIS}.*\n'Water boils.*\n'The first three prime.*\nalone, the same: True\n",
    "chat_loop": rf"{PARIS}\n\(37 tokens read, 0 were held\)\n.*Rome.*\n\(15 tokens read, 44 were held\)\n",
    "int8_weights": rf"269 MB of weights became 19\d MB\n{PARIS}",
    "lora": rf"with the adapter: +'(?!{PARIS}).*\nwithout: +'{PARIS}.*\nmerged, the same: +True\n",
    "many_requests": r"' Paris' stop 5 2\n' around .*\n' 5, .*\nbeside another one, the same: True\ncancelled 0 bytes\n",
    "own_model": r"largest difference: \de-(0[6-9]|1\d)\nZigzagAttention\(retrieval.*\n(ZigzagAttention\(streaming.*\n){2}",
    "pipeline": rf"{PARIS}(.|\n)*{PARIS}\n",
    "prompt_compression": r"None .* ' 71432'\nchunkkv .* ' 71432'\nrecent .* ' (?!71432).*'\n",
    "quantised_kv": r"none  19,077,120 bytes  ' Paris.*\nint8   5,067,360 bytes  ' Paris.*\n",
    "save_and_load_cache": r"read 265 tokens in .*\nloaded 265 tokens in .*\n 71432\n",
    "speculation": r"The grass is green\.(.|\n)*same tokens: True\ndraft=lookup: 20 tokens in \d+ rounds(.|\n)*",
    "streaming_output": rf"{PARIS}(.|\n)*' ?Paris(.|\n)*",  # 5.24 hands single tokens on
}


def test_every_program_is_here():
    assert PRINTED.keys() == {path.stem for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", PRINTED)
def test_a_program_prints_what_it_should(name, demo_place, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTIONS))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.match(PRINTED[name], printed), printed
    if name == "save_and_load_cache":
        read, loaded = map(float, re.findall(r"in (.*) s", printed))
        assert loaded < read, "a saved cache is there to save time"


@pytest.mark.slow
def test_the_notebook_prints_what_it_shows(demo_place, monkeypatch):
    """Without Jupyter: code cells in order in one namespace. Figures are drawn and not compared."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    cells = [
        cell for cell in json.loads((EXAMPLES / "choosing_a_plan.ipynb").read_text())["cells"] if cell["cell_type"] == "code"
    ]
    namespace, figures = {"__name__": "__main__"}, 0
    for number, cell in enumerate(cells):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        shown = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
        assert pages.same_output(printed.getvalue(), shown, tolerance=0.1), (
            f"cell {number} shows\n{shown}\nprinted was\n{printed.getvalue()}"
        )
        figures += any("image/png" in out.get("data", {}) for out in cell["outputs"])
    namespace["plt"].close("all")
    assert figures == 1 and len(cells) >= 5
