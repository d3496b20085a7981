"""`make check-wheels`: each wheel, in empty environments without a compiler, with the oldest torch it is for and with the newest.

In each: pip installs torch, then the wheel with its extra `demo`; the README's first program and a selection of tests run outside
the source folder, with a PATH that has no compiler. The files of the wheel are compared with those of the sdist.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import wheels

ROOT = wheels.ROOT
# The README's first program, every op against the reference, the solver, generate() and the demo. Compiled steps need a compiler.
FILES = ("test_readme", "ops/test_ops", "planning/test_solve", "hf/test_generate", "cli/test_demo")
TESTS = (*(f"tests/{name}.py" for name in FILES), "-k", "not compiled_steps")
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++", "nvcc")
_IMPORT = """
import importlib.metadata, pathlib, shutil, sys, zigzag_ext, zigzag_ext.attention.ops, torch
assert pathlib.Path(zigzag_ext.__file__).is_relative_to(sys.prefix), zigzag_ext.__file__
assert zigzag_ext.__version__ == importlib.metadata.version("zigzag_ext"), zigzag_ext.__version__
found = [name for name in sys.argv[1:] if shutil.which(name)]
assert not found, f"the PATH has {found}"
print(f"imported {zigzag_ext.build_info()} with torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheels", type=Path, nargs="*", help="default: all in dist")
    parser.add_argument("--torch", action="append", help="such as torch==2.11.*; default: the oldest, and what the index has")
    parser.add_argument("--tests", help="options of pytest in the place of the selection")
    given = parser.parse_args()
    files = given.wheels or sorted((ROOT / "dist").glob("*.whl"))
    if not files:
        sys.exit("there is no wheel in dist: make wheels")
    pythons = wheels.interpreters(wheels.at_hand())
    archives = {path.parent: sources(path.parent) for path in files}
    for path in files:
        check_content(path, archives[path.parent])
        tag = path.name.split("-")[2]
        if tag not in pythons:
            sys.exit(f"{path.name} is for {tag}, at hand are {', '.join(pythons)}")
        for torch in given.torch or [f"torch=={oldest_torch()}.*", "torch"]:
            start = time.monotonic()
            check(path.resolve(), archives[path.parent], pythons[tag], torch, given.tests.split() if given.tests else TESTS)
            print(f"{path.name} with {torch}: passed, {time.monotonic() - start:.0f} s", flush=True)
    return 0


def oldest_torch() -> str:
    return re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text()).group(1)


def sources(folder: Path) -> Path:
    """The sdist that lies beside the wheels."""
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        sys.exit(f"beside the wheels there must be their sdist, {folder} has {len(archives)}")
    return archives[0]


def check_content(wheel: Path, archive: Path) -> None:
    """The package's files of wheel and sdist are the same, but for the libraries, and nothing else is in the wheel."""
    with tarfile.open(archive) as opened:
        members = (name.partition("/")[2] for name in opened.getnames() if opened.getmember(name).isfile())
        expected = {name for name in members if name.startswith("zigzag_ext/")}
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name and name[-1] != "/"}
    libraries = {name for name in names if name.endswith(".so")}
    if names - libraries != expected or len(libraries) != 3:
        different = sorted((names - libraries) ^ expected)
        sys.exit(f"{wheel.name} differs from {archive.name}: {different}, libraries {sorted(libraries)}")


def check(wheel: Path, archive: Path, python: Path, torch: str, tests) -> None:
    """Raises CalledProcessError for what fails. The environment is gone afterwards; the converted model is kept."""
    with tempfile.TemporaryDirectory(prefix="zigzag-wheel-") as scratch:
        environment, work = Path(scratch) / "environment", Path(scratch) / "work"
        wheels.run(python, "-I", "-m", "venv", environment)
        interpreter = environment / "bin" / "python"
        pip = (interpreter, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        wheels.run(*pip, torch)
        wheels.run(*pip, f"zigzag_ext[demo] @ {wheel.as_uri()}", "pytest", "hypothesis")
        ask = "from zigzag_ext.cli.demo import FETCH_COMMAND; print(FETCH_COMMAND)"
        fetch = subprocess.run([interpreter, "-c", ask], cwd=scratch, check=True, capture_output=True, text=True).stdout
        wheels.run(interpreter, "-m", *fetch.split(), "--quiet")
        with tarfile.open(archive) as opened:
            opened.extractall(scratch, filter="data")
        (unpacked,) = Path(scratch).glob("zigzag_ext-*")
        unpacked.rename(work)
        for name in ("zigzag_ext", "zigzag_ext.egg-info"):  # what is tested is what is installed
            shutil.rmtree(work / name)
        # Only what these need of the system, by links: its folders have the compilers, too.
        (environment / "system").mkdir()
        for name in ("sh", "env", "uname"):
            (environment / "system" / name).symlink_to(shutil.which(name))
        bare = {name: value for name, value in os.environ.items() if name not in {"CC", "CXX", "CUDACXX", "PYTHONPATH"}}
        bare |= {"PATH": f"{environment / 'bin'}:{environment / 'system'}"}
        for command in (("-c", _IMPORT, *COMPILERS), ("-m", "pytest", "-q", "-x", *tests)):
            subprocess.run([interpreter, *command], cwd=work, env=bare, check=True)


if __name__ == "__main__":
    sys.exit(main())
