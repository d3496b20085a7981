"""benchmarks imports one way: timing, cells, then report and peers, then the programs."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "benchmarks"
MAY_IMPORT = {"timing": {"timing"}, "cells": {"timing", "cells"}}
MAY_IMPORT |= {room: {"timing", "cells", room} for room in ("report", "peers")}
FILES = {path.relative_to(ROOT).as_posix(): path for path in ROOT.rglob("*.py") if path.parent != ROOT}


def rooms_of(name: str, text: str) -> set[str]:
    """The rooms, or programs, that the file benchmarks/`name` imports from."""
    package = ["benchmarks", *Path(name).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            found |= {".".join([*module, each.name]) for each in node.names}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
    return {module.split(".")[1] for module in found if module.startswith("benchmarks.")}


def test_every_room_has_a_place():
    assert {Path(name).parts[0] for name in FILES} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    room = Path(name).parts[0]
    assert rooms_of(name, FILES[name].read_text()) <= MAY_IMPORT[room]


@pytest.mark.parametrize(
    "name,line,room",
    [
        ("cells/problem.py", "from ..report.records import Record", "report"),
        ("cells/problem.py", "from .. import step", "step"),
        ("peers/attention/zigzag.py", "from ...cells.scenarios import QUANTISED", "cells"),
        ("peers/attention/zigzag.py", "    from benchmarks import prefill", "prefill"),
        ("timing/clock.py", "import benchmarks.decode", "decode"),
        ("timing/clock.py", "import torch", None),
    ],
)
def test_the_check_itself(name, line, room):
    text = f"def f():\n    pass\n{line}\n" if not line.startswith(" ") else f"def f():\n{line}\n"
    assert rooms_of(name, text) == ({room} if room else set())
