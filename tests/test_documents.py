"""What the repository's documents show of its results: all of them, as they are, in documents of a size that can be read."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]
MAX_COLUMNS = 110


def targets() -> set[Path]:
    """Every file that some document links to, or shows."""
    links = [(path, link) for path in DOCUMENTS for link in re.findall(r"\]\(([^)#\s]+)", path.read_text())]
    return {(path.parent / link).resolve() for path, link in links if "://" not in link}


def test_every_link_has_a_target():
    missing = [path.relative_to(ROOT).as_posix() for path in targets() if path.is_relative_to(ROOT) and not path.exists()]
    assert not missing


def test_every_file_that_is_named_is_there():
    """Paths in code style, from the repository's root; not patterns such as `csrc/kernels/<op>/`."""
    named = re.compile(r"`((?:benchmarks|csrc|docs|examples|release|tests|zigzag_ext)/[\w/.]*)`")
    missing = {
        name
        for path in (*DOCUMENTS, ROOT / "CONTRIBUTING.md")
        for name in named.findall(path.read_text())
        if not (ROOT / name).exists()
    }
    assert not missing
    folders = re.search(r"\| `csrc/` \| .*?: (.*); `bindings`", (ROOT / "README.md").read_text()).group(1)
    assert {*re.findall(r"`(\w+)`", folders), "bindings"} == {path.name for path in (ROOT / "csrc").iterdir()}


def test_every_figure_and_every_result_is_shown():
    committed = [*(ROOT / "docs" / "figures").glob("*.png"), *RESULTS.glob("*.csv")]
    shown = targets()
    assert len(committed) > 10
    assert not [path.name for path in committed if path not in shown]


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "figures").glob("*.png")), ids=lambda path: path.name)
def test_figures_are_whole_and_readable_on_their_page(path):
    """Nothing is drawn on the outermost pixels, and text is of 9 pixels or more where a page is 830 pixels wide, as on GitHub."""
    image = pytest.importorskip("matplotlib.image").imread(path)[..., :3]
    assert all((edge == 1.0).all() for edge in (image[0], image[-1], image[:, 0], image[:, -1]))
    letters = 9 * 160 / 72  # pixels of the smallest text, of 9 points, at the 160 pixels per inch of every figure
    assert letters * min(1.0, 830 / image.shape[1]) >= 9


def prose(path: Path) -> list[tuple[int, str]]:
    """Lines of a document by number, without code, tables, pictures and what the report writes."""
    lines, fenced, generated = [], False, False
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        generated = generated and not line.startswith("<!-- /results") or line.startswith("<!-- results")
        fenced ^= line.startswith("```")
        if not (fenced or generated or line.startswith(("|", "![", "<!--", "```"))):
            lines.append((number, line))
    return lines


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_is_wrapped(path):
    wide = [f"{path.name}:{number}" for number, line in prose(path) if len(line) > MAX_COLUMNS]
    assert not wide


def test_the_document_on_performance_stays_one():
    assert len((ROOT / "docs" / "performance.md").read_text().splitlines()) <= 120


def test_the_documents_show_the_results_that_are_there(tmp_path):
    """`python -m benchmarks.report` would change no word of them."""
    pytest.importorskip("matplotlib")
    from benchmarks.report import __main__ as report

    (tmp_path / "docs").mkdir()
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results")
    for name in report.DOCUMENTS:
        shutil.copy(ROOT / name, tmp_path / name)
    assert report.main(["--results", str(tmp_path / "benchmarks" / "results"), "--root", str(tmp_path)]) == 0
    for name in report.DOCUMENTS:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), name


def test_every_environment_variable_is_in_the_table():
    table = set(re.findall(r"^\| `([A-Z_]+)`", (ROOT / "docs" / "environment.md").read_text(), re.MULTILINE))
    folders = (ROOT / name for name in ("zigzag_ext", "csrc", "tests", "benchmarks"))
    code = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*"))]
    read = {"ZIGZAG_CUDA", "ZIGZAG_BUILD_DIR"}
    for path in code:
        if path.suffix in {".py", ".h", ".cuh", ".cpp", ".cu"}:
            read |= set(re.findall(r"""["'](ZIGZAG_[A-Z_]+)["']""", path.read_text()))
    build = (ROOT / "Makefile").read_text()
    make = set(re.findall(r"^([A-Z_]+) \?=", build, re.MULTILINE)) | set(re.findall(r"\$\((\w+_ARGS)\)", build))
    assert len(read) > 10 and len(make) > 5
    assert {name for name in table if name.startswith("ZIGZAG_")} == read
    assert make <= table
