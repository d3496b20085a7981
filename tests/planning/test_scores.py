"""Reading score files: DuoAttention folders, tables, and every way they can be wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from published import PUBLISHED, needs_published

from zigzag_ext.planning.scores import load_scores, save_scores
from zigzag_ext.planning.solve import solve


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
    for name, message in [("a.tsv", "not a text file"), ("a.pt", "not a torch-saved tensor"), ("a.npy", "not an .npy file")]:
        binary = tmp_path / name
        binary.write_bytes(b"PK\x03\x04\xff\xfe\x80")
        with pytest.raises(ValueError, match=f"{name} is {message}"):
            load_scores(binary)


@pytest.mark.parametrize("name", ["s.tsv", "s.csv", "s.npy", "folder"])
def test_saved_scores_are_read_back_bit_for_bit(tmp_path, name):
    scores = np.random.default_rng(0).random((7, 3))
    save_scores(scores, tmp_path / name, sink=4, window=9)
    np.testing.assert_array_equal(load_scores(tmp_path / name), scores)
    if name == "folder":
        np.testing.assert_array_equal(np.loadtxt(tmp_path / name / "full_attention_heads.tsv", delimiter="\t"), scores)
        assert json.loads((tmp_path / name / "config.json").read_text()) == {"sink_size": 4, "recent_size": 9}


@pytest.mark.parametrize("shape", [(5, 2), (5, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_files(tmp_path, shape, dtype):
    tensor = torch.rand(shape).to(dtype)
    torch.save(tensor, tmp_path / "s.pt")
    np.testing.assert_array_equal(load_scores(tmp_path / "s.pt"), tensor.reshape(5, 2).double().numpy())


class Dangerous:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in a score file was run')",)


def test_torch_files_run_no_code(tmp_path):
    torch.save(Dangerous(), tmp_path / "s.pt")
    with pytest.raises(ValueError, match="not a torch-saved tensor"):
        load_scores(tmp_path / "s.pt")


@pytest.mark.parametrize(
    "content, message",
    [
        (np.zeros((2, 2, 2)), "got float64 [2, 2, 2]"),
        (np.zeros((0, 2)), "got float64 [0, 2]"),
        (np.zeros((2, 2), dtype=complex), "got complex128"),
        (np.array([["a"]]), "got <U1"),
        (np.array([[0.5, 2.0]]), "score 2.0 of layer 0, KV head 1 lies outside"),
        (np.array([[0.5], [np.nan]]), "score nan of layer 1, KV head 0"),
        (np.array([[None]]), "not an .npy file"),
    ],
)
def test_bad_arrays(tmp_path, content, message):
    np.save(tmp_path / "s.npy", content, allow_pickle=True)
    with pytest.raises(ValueError) as raised:
        load_scores(tmp_path / "s.npy")
    assert message in str(raised.value)


@pytest.mark.parametrize("content", [{"a": torch.zeros(2, 2)}, torch.zeros(2, 2, dtype=torch.complex64)])
def test_bad_torch_files(tmp_path, content):
    torch.save(content, tmp_path / "s.pt")
    with pytest.raises(ValueError, match="must hold one tensor of real numbers"):
        load_scores(tmp_path / "s.pt")


def test_saving_refuses(tmp_path):
    with pytest.raises(ValueError, match="cannot write scores as .pt; supported: .tsv, .csv, .npy, or a folder"):
        save_scores([[0.5]], tmp_path / "s.pt")
    with pytest.raises(ValueError, match="lies outside"):
        save_scores([[1.5]], tmp_path / "s.csv")
    assert not list(tmp_path.iterdir())


@needs_published
def test_published_kvzip_file():
    scores = load_scores(PUBLISHED / "qwen2.5-7b-scbench_qa_eng-0.pt")
    assert scores.shape == (28, 4)
    assert 0 < scores.min() < 0.2 and scores.max() == 1
    assert len(solve(scores, 0.5).retrieval_layers) == 14


# Shares that "count" retains at half the layers and times that "mean" moves more heads than "transport", computed
# independently (numpy). Ties among heads that score the same decide the third decimal.
@needs_published
@pytest.mark.parametrize(
    "model, count, ratio",
    [
        ("Llama-2-7B-32K-Instruct", 0.636, 3.3),
        ("Llama-3-8B-Instruct-Gradient-1048k", 0.554, 3.2),
        ("Meta-Llama-3.1-8B-Instruct", 0.546, 3.4),
        ("Mistral-7B-Instruct-v0.2", 0.534, 5.1),
    ],
)
def test_published_files_under_other_objectives(model, count, ratio):
    scores = load_scores(PUBLISHED / model)
    layers, kv_heads = scores.shape
    plans = {objective: solve(scores, 0.5, objective) for objective in ("mean", "count", "transport", "max")}
    assert plans["count"].retained_score == pytest.approx(count, abs=2e-3)
    assert plans["max"].retained_score <= plans["mean"].retained_score
    best_heads = np.argsort(-scores, axis=None, kind="stable")[: layers * kv_heads // 2]
    heads = np.cumsum(np.bincount(best_heads // kv_heads, minlength=layers))
    whole = np.cumsum([kind == "retrieval" for kind in plans["mean"].kinds]) * kv_heads
    assert np.abs(heads - whole).sum() / plans["transport"].objective_value == pytest.approx(ratio, abs=0.06)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_scores_may_be_tensors_of_any_dtype(dtype, tmp_path):
    """numpy has no bfloat16, and takes no tensor that records gradients."""
    scores = torch.tensor([[0.75, 0.5], [0.125, 0.25]], dtype=getattr(torch, dtype), requires_grad=True)
    assert solve(scores, retrieval_ratio=0.5).kinds == ("retrieval", "streaming")
    save_scores(scores, tmp_path / "scores.tsv")
    torch.save(scores.detach(), tmp_path / "scores.pt")
    for path in ("scores.tsv", "scores.pt"):
        assert load_scores(tmp_path / path).tolist() == [[0.75, 0.5], [0.125, 0.25]]
