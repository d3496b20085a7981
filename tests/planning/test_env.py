"""Environment variables: the tables are complete, and a bad value is an error that names it, where the value is needed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import zigzag_ext
from zigzag_ext import _C
from zigzag_ext.planning import env

ROOT = Path(__file__).parents[2]
MACROS = "ZIGZAG_VERSION ZIGZAG_CUDA_ARCHS ZIGZAG_WITH_CUDA ZIGZAG_SM90A ZIGZAG_CPU_VEC_BITS ZIGZAG_CUDA"


def test_every_variable_is_in_a_table():
    sources = [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "zigzag_ext").rglob("*.py")]
    read = [name for file in sources for name in re.findall(r'"(ZIGZAG_[A-Z_]+)"', file.read_text())]
    assert set(read) - set(MACROS.split()) == _C.environment().keys() | env.VARIABLES.keys()
    getters = [file.name for file in sources if re.search(r"getenv|environ\b.*ZIGZAG|environ\.get\(name", file.read_text())]
    assert sorted(getters) == ["env.cpp", "env.py"]


def test_a_bad_value_names_the_variable_the_value_and_what_is_supported(monkeypatch):
    for name, (supported, meaning) in env.VARIABLES.items():
        assert meaning
        monkeypatch.setenv(name, "")
        assert env.read(name) is None
        for value in supported:
            monkeypatch.setenv(name, value)
            assert env.read(name) == value
        monkeypatch.setenv(name, "x")
        if not supported:
            assert env.read(name) == "x"
            continue
        with pytest.raises(ValueError, match=f"{name} is 'x'; supported: {', '.join(supported)}"):
            env.read(name)


def test_the_document_has_every_variable_and_value():
    text = (ROOT / "docs" / "environment.md").read_text()
    rows = {m[1]: m[2] for m in re.finditer(r"^\| `(ZIGZAG_\w+)` \| ([^|]*) \|", text.split("\n## ")[1], re.MULTILINE)}
    tables = {name: supported for name, (supported, _) in env.VARIABLES.items()}
    tables |= {name: re.split(", | to ", supported) for name, (supported, _) in _C.environment().items()}
    assert {name: re.findall(r"`([^`]+)`", row) for name, row in rows.items()} == {n: list(v) for n, v in tables.items()}


def test_backends_are_those_that_exist():
    backends = pytest.importorskip("zigzag_ext.attention.backends")
    assert env.VARIABLES["ZIGZAG_PREFILL_BACKEND"][0] == ("auto", "zigzag", *backends.BACKENDS)


def test_a_bad_instruction_set_stops_the_first_op_and_not_the_import():
    code = """
import torch, zigzag_ext as zz
print(zz.build_info()["cpu_isa"])
cache = torch.zeros(1, 1, 4, 64)
new = torch.zeros(1, 1, 1, 64)
zz.ops.append(new, new, cache, cache.clone(), torch.zeros(1, dtype=torch.int32))
"""
    environment = {**os.environ, "ZIGZAG_CPU_ISA": "x"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    message = "ZIGZAG_CPU_ISA is 'x'; supported: baseline, avx2, avx512"
    assert done.stdout.strip() == f"error: {message}"
    assert done.returncode == 1 and f"RuntimeError: {message}" in done.stderr
    assert zigzag_ext.build_info()["cpu_isa"] in ("baseline", "avx2", "avx512")
