"""What `make wheels` builds for, and what `make check-wheels` compares."""

import io
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "release"))

import check_wheels  # noqa: E402
import wheels  # noqa: E402


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_interpreters_are_asked_what_they_are(tmp_path):
    """One per version; without headers, without the GIL, of another kind, too old or not working ones are left out."""
    answers = {
        "a/python3.12": "cpython 0 3 12 True /x/a b/python3.12",
        "b/python3.12": "cpython 0 3 12 True /other",
        "b/python3.11": "cpython 0 3 11 True /x/python3.11",
        "b/python3.9": "cpython 0 3 9 True /x",
        "b/python3.13": "cpython 1 3 13 True /x",
        "b/python3.14": "cpython 0 3 14 False /x",
        "b/python3.10": "pypy 0 3 10 True /x",
    }
    paths = [program(tmp_path / name, f"echo '{answer}'") for name, answer in answers.items()]
    paths.append(program(tmp_path / "shims" / "python3.15", "exit 127"))
    assert wheels.interpreters(paths) == {"cp311": Path("/x/python3.11"), "cp312": Path("/x/a b/python3.12")}


def test_the_running_interpreter_is_one_if_it_has_headers():
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    has_headers = (Path(sysconfig.get_path("include")) / "Python.h").exists()
    assert list(wheels.interpreters([Path(sys.executable)])) == [tag] * has_headers


def test_interpreters_at_hand(tmp_path, monkeypatch):
    for name in ("bin/python3.11", "bin/python3.11-config", "bin/python3", "pyenv/versions/3.12.1/bin/python3.12"):
        program(tmp_path / name, "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{tmp_path / 'none'}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    found = [path for path in wheels.at_hand() if path.is_relative_to(tmp_path)]
    assert [path.name for path in found] == ["python3.11", "python3.12"]


LIBRARIES = ("zigzag_ext/_C.cpython-311-x86_64-linux-gnu.so", "zigzag_ext/_ops.abi3.so", "zigzag_ext/libzigzag_core.so")


@pytest.mark.parametrize("inside, message", [
    (["zigzag_ext/__init__.py", "zigzag_ext/py.typed", *LIBRARIES], None),
    (["zigzag_ext/__init__.py", *LIBRARIES], r"differs from x.tar.gz: \['zigzag_ext/py.typed'\]"),
    (["zigzag_ext/__init__.py", "zigzag_ext/py.typed", "tests/a.py", *LIBRARIES], r"\['tests/a.py'\]"),
    (["zigzag_ext/__init__.py", "zigzag_ext/py.typed", *LIBRARIES[:2]], "libraries .*_ops.abi3.so'"),
    (["zigzag_ext/__init__.py", "zigzag_ext/py.typed", *LIBRARIES, "zigzag_ext.libs/libtorch_cpu.so"], "libtorch_cpu.so"),
])  # fmt: skip
def test_a_wheel_has_the_files_of_the_sdist(tmp_path, inside, message):
    wheel, archive = tmp_path / "x.whl", tmp_path / "x.tar.gz"
    with zipfile.ZipFile(wheel, "w") as made:
        for name in [*inside, "zigzag_ext/", "x.dist-info/METADATA"]:
            made.writestr(name, "")
    with tarfile.open(archive, "w:gz") as made:
        for name in ("x/zigzag_ext/__init__.py", "x/zigzag_ext/py.typed", "x/setup.py"):
            made.addfile(tarfile.TarInfo(name), io.BytesIO())
    if message is None:
        return check_wheels.check_content(wheel, archive)
    with pytest.raises(SystemExit, match=message):
        check_wheels.check_content(wheel, archive)


def test_the_oldest_torch_is_that_of_the_metadata():
    assert check_wheels.oldest_torch() == "2.11"
