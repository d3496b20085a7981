"""Reading score files: DuoAttention folders, tables, and every way they can be wrong."""

from pathlib import Path

import numpy as np
import pytest

from zigzag_ext.scores import load_scores
from zigzag_ext.solve import solve

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "head_scores"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_duo_folder_and_file_agree_and_are_clipped(tmp_path):
    raw = np.array([[0.5, -1.4e-3, 1.0], [1.0000001, 0.25, 0.0]])
    np.savetxt(tmp_path / "full_attention_heads.tsv", raw, delimiter="\t")
    (tmp_path / "config.json").write_text('{"sink_size": 128, "recent_size": 256}')
    scores = load_scores(tmp_path)
    assert scores.dtype == np.float64 and scores.shape == (2, 3)
    np.testing.assert_array_equal(scores, np.clip(raw, 0, 1))
    np.testing.assert_array_equal(load_scores(str(tmp_path / "full_attention_heads.tsv")), scores)


def test_spaces_comments_and_empty_lines(tmp_path):
    path = write(tmp_path / "scores.txt", "# two layers\n\n0.5 0.25\r\n  1\t0  \n\n")
    np.testing.assert_array_equal(load_scores(path), [[0.5, 0.25], [1, 0]])


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no scores"),
        ("\n# nothing\n\n", "holds no scores"),
        ("0.5\t0.5\n0.5\n", "bad.tsv:2: 1 values, but the rows above have 2"),
        ("0.5\n\n0.5\t0.1\n", "bad.tsv:3: 2 values, but the rows above have 1"),
        ("0.5\t0.5\n0.5\tnan\n", "bad.tsv:2: score nan lies outside [0, 1]"),
        ("inf\n", "bad.tsv:1: score inf"),
        ("0.5\n-0.0101\n", "bad.tsv:2: score -0.0101"),
        ("1.0101\n", "bad.tsv:1: score 1.0101"),
        ("0.5\thalf\n", "bad.tsv:1: 'half' is not a number"),
        ("0.5,0.5\n", "bad.tsv:1: '0.5,0.5' is not a number"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, text, message):
    path = write(tmp_path / "bad.tsv", text)
    with pytest.raises(ValueError) as raised:
        load_scores(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)


def test_tolerance_is_inclusive(tmp_path):
    np.testing.assert_array_equal(load_scores(write(tmp_path / "edge.tsv", "-0.01\t1.01\n")), [[0, 1]])


def test_missing_and_binary(tmp_path):
    with pytest.raises(FileNotFoundError, match="no scores at .*absent.tsv"):
        load_scores(tmp_path / "absent.tsv")
    with pytest.raises(FileNotFoundError, match="has no full_attention_heads.tsv"):
        load_scores(tmp_path)
    binary = tmp_path / "scores.pt"
    binary.write_bytes(b"PK\x03\x04\xff\xfe\x80")
    with pytest.raises(ValueError, match="not a text file"):
        load_scores(binary)


# Share of the score that the best half of the layers retains, computed independently (numpy, top-K of the clipped row means).
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"published score files are not at {PUBLISHED}")
@pytest.mark.parametrize(
    "model, shape, retained",
    [
        ("Llama-2-7B-32K-Instruct", (32, 32), 0.640),
        ("Llama-3-8B-Instruct-Gradient-1048k", (32, 8), 0.583),
        ("Meta-Llama-3.1-8B-Instruct", (32, 8), 0.553),
        ("Mistral-7B-Instruct-v0.2", (32, 8), 0.536),
    ],
)
def test_published_files(model, shape, retained):
    scores = load_scores(PUBLISHED / model)
    assert scores.shape == shape
    assert scores.min() >= 0 and scores.max() <= 1
    plan = solve(scores, 0.5, "mean")
    assert len(plan.retrieval_layers) == 16
    assert plan.provenance["retained_score"] == pytest.approx(retained, abs=5e-4)
    top = np.sort(np.argsort(-scores.mean(1), kind="stable")[:16])
    assert plan.retrieval_layers == tuple(top)
