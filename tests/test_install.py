"""What an installation starts from: the build's choice of architectures, its metadata, and an import that finds the source."""

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from test_structure import tracked

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
    assert zz.__version__.partition("+")[0] == version
    changelog = re.search(r"^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changelog.group(1) == version
    for name in ("CITATION.cff", "setup.py", "CMakeLists.txt", "README.md"):
        assert version not in (ROOT / name).read_text(), name


@pytest.mark.parametrize("section, change, error", [
    ("[1.2.0] - unreleased", False, "must be '[1.2.0] - ' and the date, it is '[1.2.0] - unreleased'"),
    ("[1.1.0] - 2026-01-02", False, "must be '[1.2.0] - ' and the date, it is '[1.1.0] - 2026-01-02'"),
    ("[1.2.0] - 2026-01-02", True, "not committed:\n M pyproject.toml"),
    ("[1.2.0] - 2026-01-02", False, None),
])  # fmt: skip
def test_what_may_be_tagged(tmp_path, section, change, error):
    (tmp_path / "pyproject.toml").write_text('version = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {section}\n- x\n\n## [0.1.0] - 2025-01-02\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    (tmp_path / "pyproject.toml").write_text('version = "1.2.0"\n' + "# x" * change)
    run = subprocess.run([sys.executable, ROOT / ".ci" / "checks.py", "release"], cwd=tmp_path, capture_output=True, text=True)
    assert (run.stdout, run.returncode) == (("", 1) if error else ("1.2.0\n", 0))
    assert error is None or error in run.stderr


README = "![a picture](docs/a.png)\n\n[file](docs/b.md#c) [here](#d) [there](https://e.org/f) ![far](https://e.org/g.png)\n"
AT = "https://h.org/zz/{}/v1.2/docs"


@pytest.mark.parametrize("repository, expected", [
    (None, "\nfile [here](#d) [there](https://e.org/f) ![far](https://e.org/g.png)\n"),
    (
        "https://h.org/zz/",
        f"![a picture]({AT.format('raw')}/a.png)\n\n[file]({AT.format('blob')}/b.md#c) [here](#d) [there](https://e.org/f) "
        "![far](https://e.org/g.png)\n",
    ),
])  # fmt: skip
def test_the_description_on_an_index_has_no_dead_links(build, repository, expected):
    assert build["long_description"](README, "1.2+cpu", repository) == expected


def test_the_sdist_has_every_file_and_says_what_the_readme_says(tmp_path):
    source = tmp_path / "source"
    for path in tracked():
        (source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, source / path.relative_to(ROOT))
    shutil.copytree(ROOT / "third_party", source / "third_party", dirs_exist_ok=True)
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    command = [sys.executable, "setup.py", "-q", "egg_info", "--tag-build=+cpu", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (archive,) = tmp_path.glob("zigzag_ext-*+cpu.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames() if opened.getmember(name).isfile()}
        description = opened.extractfile(archive.name.removesuffix(".tar.gz") + "/PKG-INFO").read().decode()
    made = {name for name in names if ".egg-info/" in name} | {"PKG-INFO", "setup.cfg"}
    assert names - made == files
    assert "\nName: zigzag_ext\n" in description and "\nAuthor: The zigzag_ext authors\n" in description
    assert "# zigzag_ext\nFor whoever runs" in description and "](docs/" not in description


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
