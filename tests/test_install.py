"""What an installation starts from: the build's choice of architectures, its metadata, and an import that finds the source."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import zigzag_ext as zz

ROOT = Path(__file__).parent.parent


@pytest.fixture
def build(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize("asked, gpus, archs", [
    (None, ["9.0", "9.0"], "90a"),
    (None, ["8.0", "12.0", "10.0"], "100a;120;80"),
    (None, ["8.9", "7.5"], "89"),
    (None, ["7.5"], None),
    (None, [], None),
    ("all", ["9.0"], None),
    ("80;90a", ["12.0"], "80;90a"),
])  # fmt: skip
def test_kernels_are_built_for_the_gpus_at_hand(build, asked, gpus, archs):
    assert build["cuda_archs"](asked, gpus) == archs


@pytest.mark.parametrize("output, code, found", [("9.0\n8.9\n", 0, ["9.0", "8.9"]), ("[N/A]\n", 0, []), ("9.0\n", 9, [])])
def test_gpus_are_asked_for_and_none_is_no_error(build, monkeypatch, tmp_path, output, code, found):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{output}'\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert build["_compute_capabilities"]() == found
    monkeypatch.setenv("PATH", str(ROOT / "docs"))
    assert build["_compute_capabilities"]() == []


def test_a_source_folder_that_is_not_built_says_so(tmp_path):
    """As in a checkout after `pip install .`: what is installed has the compiled modules, and is not found."""
    shutil.copytree(ROOT / "zigzag_ext", tmp_path / "zigzag_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run = lambda: subprocess.run([sys.executable, "-S", "-c", "import zigzag_ext"], cwd=tmp_path, capture_output=True, text=True)  # noqa: E731
    error = run().stderr.strip().splitlines()[-1]
    assert error.startswith(f"ImportError: {tmp_path}/zigzag_ext is a source folder of zigzag_ext without compiled modules")
    assert f"pip install -e {tmp_path}" in error and "circular" not in run().stderr
    (tmp_path / "zigzag_ext" / "_C.abi3.so").write_bytes(b"no library")
    assert "_C.abi3.so" in run().stderr and "source folder" not in run().stderr


def test_the_version_stands_in_one_place():
    version = re.search(r'^version = "(.+?)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert zz.__version__ == version
    for name in ("CITATION.cff", "setup.py", "CMakeLists.txt", "README.md"):
        assert version not in (ROOT / name).read_text(), name


def test_extras_are_quoted():
    """zsh takes .[cli] for a pattern of file names."""
    documents = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "benchmarks").rglob("*.md"),
    ]
    bare = [
        f"{path.name}: {line}"
        for path in documents
        for line in path.read_text().splitlines()
        if re.search(r"pip install [^'\"`]*\[\w", line)
    ]
    assert not bare
