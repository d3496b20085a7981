"""Reading and writing head scores: DuoAttention folders, tables of text, .npy, and KVzip's .pt.

Files that `save_scores` writes say what the scores were made for (`origin.py`): tables, a DuoAttention folder's too, in a comment
before the first row, `# zigzag-scores {"model": ..., "method": ...}`; .npy files in a second array behind the scores, a string
that readers of the first one do not see. Files without that are read as they always were.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import ArrayLike

from .origin import known

DUO_SCORES = "full_attention_heads.tsv"
_ORIGIN_MARK = "zigzag-scores "
_TOLERANCE = 0.01  # trained gates overshoot [0, 1] slightly: published files go down to -1.4e-3


class Scores(np.ndarray):
    """float64 [layers, kv_heads] that knows its `origin`, see `origin.py`. What is computed from it is a plain array."""

    origin: dict

    def __new__(cls, matrix: ArrayLike, origin: dict):
        scores = np.array(matrix, dtype=np.float64).view(cls)
        scores.origin = {**origin, "layers": scores.shape[0], "kv_heads": scores.shape[1]}
        return scores

    def __array_finalize__(self, source) -> None:
        self.origin = {}

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return array[()] if return_scalar else np.asarray(array)


def load_scores(path: str | os.PathLike) -> Scores:
    """Reads head scores from a DuoAttention folder or a file.

    Args:
        path: a folder as DuoAttention publishes them (`full_attention_heads.tsv` beside a `config.json`; the latter describes
            the identification run and is not needed), or a file:
            .npy: an array [layers, kv_heads];
            .pt: a torch-saved tensor [layers, kv_heads], or [layers, 1, kv_heads] as KVzip saves it (loaded with
            weights_only=True, so no code in it runs);
            .csv: text, one row per layer and one column per KV head, separated by commas;
            anything else: the same, separated by tabs or spaces. Empty lines and lines that start with # are skipped.

    Returns:
        float64 [layers, kv_heads], clipped to [0, 1] as DuoAttention does. The attribute `origin` says what they were made for,
        as far as the file does: model, method, geometry (`origin.py`).

    Raises:
        FileNotFoundError: there is nothing at `path`, or the folder holds no scores.
        ValueError: a row is ragged, a value is no number or lies outside [-0.01, 1.01], there are no rows, or the file is not of
            the kind that its name says; the message names the file, and for text the line.

    Source of the formats: https://github.com/mit-han-lab/duo-attention (attn_patterns),
    https://github.com/snu-mllab/KVzip (utils/head_score).
    """
    path = Path(path)
    if path.is_dir():
        path = path / DUO_SCORES
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} is not a DuoAttention folder: it has no {DUO_SCORES}")
    elif not path.exists():
        raise FileNotFoundError(f"there are no scores at {path}")
    matrix, origin = _READERS.get(path.suffix.lower(), _read_text)(path)
    scores = Scores(np.clip(matrix, 0.0, 1.0), origin)
    if changed := [f"{name} {value}" for name, value in origin.items() if scores.origin[name] != value]:
        raise ValueError(f"{path} says that it has {', '.join(changed)}, it holds scores {list(matrix.shape)}")
    return scores


def save_scores(scores: ArrayLike, path: str | os.PathLike, *, sink: int = 128, window: int = 256) -> None:
    """Writes head scores so that `load_scores` reads the same numbers, and the same origin.

    Args:
        scores: [layers, kv_heads] in [0, 1], such as `load_scores` and `identify` return.
        path: a name that ends in .tsv, .csv or .npy; any other name without an ending becomes a DuoAttention folder,
            `full_attention_heads.tsv` and a `config.json` with `sink` and `window` as its sink_size and recent_size.

    Raises:
        ValueError: scores are not such a matrix, or the ending is another one.
    """
    path, matrix = Path(path), np.asarray(scores, dtype=np.float64)
    _check_matrix(matrix, "scores to save")
    suffix, origin = path.suffix.lower(), getattr(scores, "origin", {})
    note = _ORIGIN_MARK + json.dumps(origin) if origin else ""
    if suffix == ".npy":
        with path.open("wb") as file:
            for array in (matrix, np.array(note)) if note else (matrix,):
                np.save(file, array)
    elif suffix in _SEPARATORS:
        np.savetxt(path, matrix, delimiter=_SEPARATORS[suffix], fmt="%.18e", header=note)
    elif not suffix or path.is_dir():
        path.mkdir(parents=True, exist_ok=True)
        np.savetxt(path / DUO_SCORES, matrix, delimiter="\t", fmt="%.18e", header=note)
        (path / "config.json").write_text(json.dumps({"sink_size": sink, "recent_size": window}) + "\n", encoding="utf-8")
    else:
        raise ValueError(f"cannot write scores as {suffix}; supported: .tsv, .csv, .npy, or a folder (no ending)")


def _read_text(path: Path) -> tuple[np.ndarray, dict]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file; supported: a DuoAttention folder, .tsv, .csv, .npy, .pt") from error
    comments = (line.lstrip()[1:].strip() for line in lines if line.lstrip().startswith("#"))
    return _parse_rows(lines, path), next((_parse_note(text, path) for text in comments if text.startswith(_ORIGIN_MARK)), {})


def _parse_note(text: str, path: Path) -> dict:
    try:
        return known(json.loads(text.removeprefix(_ORIGIN_MARK)))
    except ValueError as error:
        raise ValueError(f"{path}: what follows {_ORIGIN_MARK.strip()!r} is not JSON: {error}") from error


def _read_npy(path: Path) -> tuple[np.ndarray, dict]:
    try:
        with path.open("rb") as file:
            matrix = np.lib.format.read_array(file, allow_pickle=False)
            note = _text_behind(file)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not an .npy file of numbers: {error}") from error
    return _check_matrix(matrix, str(path)), _parse_note(note, path) if note.startswith(_ORIGIN_MARK) else {}


def _text_behind(file: BinaryIO) -> str:
    """The array that follows in an .npy file, as text; "" if what follows, if anything, is none."""
    try:
        return str(np.lib.format.read_array(file, allow_pickle=False))
    except ValueError:
        return ""


def _read_pt(path: Path) -> tuple[np.ndarray, dict]:
    import torch  # for this format only

    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a torch-saved tensor: {str(error).splitlines()[0]}") from error
    if not isinstance(tensor, torch.Tensor) or tensor.is_complex():
        raise ValueError(f"{path} must hold one tensor of real numbers, got {type(tensor).__name__}")
    if tensor.dim() == 3 and tensor.shape[1] == 1:
        tensor = tensor[:, 0]
    return _check_matrix(tensor.double().numpy(), str(path)), {}


def _check_matrix(matrix: np.ndarray, place: str) -> np.ndarray:
    if matrix.dtype.kind not in "fiub" or matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{place}: scores must be numbers [layers, kv_heads], got {matrix.dtype} {list(matrix.shape)}")
    matrix = matrix.astype(np.float64)
    outside = np.argwhere(~((matrix >= -_TOLERANCE) & (matrix <= 1.0 + _TOLERANCE)))
    if len(outside):
        layer, head = outside[0]
        raise ValueError(f"{place}: score {matrix[layer, head]} of layer {layer}, KV head {head} lies outside [0, 1]")
    return matrix


def _parse_rows(lines: list[str], path: Path) -> np.ndarray:
    separator = "," if path.suffix.lower() == ".csv" else None
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        row = [_parse_score(text.strip(), f"{path}:{number}") for text in line.split(separator)]
        if rows and len(row) != len(rows[0]):
            raise ValueError(f"{path}:{number}: {len(row)} values, but the rows above have {len(rows[0])}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no scores")
    return np.array(rows, dtype=np.float64)


def _parse_score(text: str, place: str) -> float:
    try:
        score = float(text)
    except ValueError:
        raise ValueError(f"{place}: {text!r} is not a number") from None
    if not -_TOLERANCE <= score <= 1.0 + _TOLERANCE:
        raise ValueError(f"{place}: score {text} lies outside [0, 1]")
    return score


_SEPARATORS = {".tsv": "\t", ".csv": ","}
_READERS: dict[str, Callable[[Path], tuple[np.ndarray, dict]]] = {".npy": _read_npy, ".pt": _read_pt}
