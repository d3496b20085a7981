"""Reading and writing head scores: DuoAttention folders, tables of text, .npy, and KVzip's .pt.

Files that `save_scores` writes say what the scores were made for (`origin.py`): tables, a DuoAttention folder's too, in a comment
before the first row, `# zigzag-scores {"model": ..., "method": ...}`; .npy files in a second array behind the scores, a string
that readers of the first one do not see. Files without that are read as they always were.
"""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from .arrays import MAX_ELEMENTS, parse_npy, read_npy, read_pt
from .origin import known
from .reading import located, one_line, parse_json, read_text, shown
from .writing import check_writable, is_stream, write

DUO_SCORES = "full_attention_heads.tsv"
_ORIGIN_MARK = "zigzag-scores "
_MAX_TEXT = 32 * MAX_ELEMENTS  # bytes; `save_scores` writes at most 26 per score
_TOLERANCE = 0.01  # trained gates overshoot [0, 1] slightly: published files go down to -1.4e-3


class Scores(np.ndarray):
    """float64 [layers, kv_heads] that knows its `origin`, see `origin.py`. What is computed from it is a plain array."""

    origin: dict

    def __new__(cls, matrix: ArrayLike, origin: dict):
        scores = np.array(as_array(matrix), dtype=np.float64).view(cls)
        scores.origin = {**origin, "layers": scores.shape[0], "kv_heads": scores.shape[1]}
        return scores

    def __array_finalize__(self, source) -> None:
        self.origin = {}

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return array[()] if return_scalar else np.asarray(array)


def as_array(values: ArrayLike) -> np.ndarray:
    """An array of what may be a torch tensor of any dtype, on any device, with or without gradients. torch is not imported."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    return np.asarray(values)


def load_scores(path: str | os.PathLike) -> Scores:
    """Reads head scores from a DuoAttention folder or a file.

    Args:
        path: a folder as DuoAttention publishes them (`full_attention_heads.tsv` beside a `config.json`; the latter describes
            the identification run and is not needed), or a file:
            .npy: an array [layers, kv_heads];
            .pt: a torch-saved dense tensor [layers, kv_heads], or [layers, 1, kv_heads] as KVzip saves it (loaded with
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
    if changed := [f"{name} {shown(value)}" for name, value in origin.items() if scores.origin[name] != value]:
        raise ValueError(f"{path} says that it has {', '.join(changed)}, it holds scores {list(matrix.shape)}")
    return scores


def save_scores(scores: ArrayLike, path: str | os.PathLike, *, sink: int = 128, window: int = 256) -> None:
    """Writes head scores so that `load_scores` reads the same numbers, and the same origin.

    Args:
        scores: [layers, kv_heads] in [0, 1], such as `load_scores` and `identify` return.
        path: a name that ends in .tsv, .csv or .npy; any other name without an ending becomes a DuoAttention folder,
            `full_attention_heads.tsv` and a `config.json` with `sink` and `window` as its sink_size and recent_size.

    Raises:
        ValueError: scores are not such a matrix, or the ending is another one. OSError: as `writing.write`, which writes each
            file whole or not at all.
    """
    matrix = np.asarray(as_array(scores), dtype=np.float64)
    _check_matrix(matrix, "scores to save")
    path, suffix, origin = Path(path), _ending(path), getattr(scores, "origin", {})
    note, content = _ORIGIN_MARK + json.dumps(origin) if origin else "", io.BytesIO()
    if suffix == ".npy":
        for array in (matrix, np.array(note)) if note else (matrix,):
            np.save(content, array)
    else:
        np.savetxt(content, matrix, delimiter=_SEPARATORS[suffix or ".tsv"], fmt="%.18e", header=note)
    if suffix:
        write(path, content.getvalue())
        return
    path.mkdir(parents=True, exist_ok=True)
    write(path / DUO_SCORES, content.getvalue())
    write(path / "config.json", (json.dumps({"sink_size": sink, "recent_size": window}) + "\n").encode())


def check_output(path: str | os.PathLike) -> None:
    """Raises what `save_scores` would raise for `path`, before there are scores. Nothing is left there."""
    path = Path(path)
    if _ending(path) or not path.is_dir():
        check_writable(path)  # of a folder that is to be made: whether something can be made beside it
        return
    for name in (DUO_SCORES, "config.json"):
        check_writable(path / name)


def _ending(path: str | os.PathLike) -> str:
    """.tsv, .csv or .npy; empty for a DuoAttention folder. What is no file that can be replaced (/dev/stdout) gets a TSV."""
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in (*_SEPARATORS, ".npy") and not path.is_dir():
        return suffix
    if is_stream(path):
        return ".tsv"
    if path.is_file():
        raise ValueError(f"cannot write scores to {path}: a file without the ending .tsv, .csv or .npy is in the way of a folder")
    if suffix and not path.is_dir():
        raise ValueError(f"cannot write scores as {suffix}; supported: .tsv, .csv, .npy, or a folder (no ending)")
    return ""


def _read_text(path: Path) -> tuple[np.ndarray, dict]:
    text = read_text(path, "a text file of scores; supported: a DuoAttention folder, .tsv, .csv, .npy, .pt", _MAX_TEXT)
    lines = text.splitlines()
    comments = (line.lstrip()[1:].strip() for line in lines if line.lstrip().startswith("#"))
    return _parse_rows(lines, path), next((_parse_note(text, path) for text in comments if text.startswith(_ORIGIN_MARK)), {})


def _parse_note(text: str, path: Path) -> dict:
    with located(f"{path}: what follows {_ORIGIN_MARK.strip()!r} is not JSON"):
        return known(parse_json(text.removeprefix(_ORIGIN_MARK)))


def _read_npy(path: Path) -> tuple[np.ndarray, dict]:
    matrix, behind = read_npy(path, "an .npy file of numbers")
    try:
        note = str(parse_npy(behind)[0])
    except ValueError:
        note = ""  # whatever another program has put there
    return _check_matrix(matrix, str(path)), _parse_note(note, path) if note.startswith(_ORIGIN_MARK) else {}


def _read_pt(path: Path) -> tuple[np.ndarray, dict]:
    matrix = read_pt(path, "a torch-saved tensor")
    return _check_matrix(matrix[:, 0] if matrix.ndim == 3 and matrix.shape[1] == 1 else matrix, str(path)), {}


def _check_matrix(matrix: np.ndarray, place: str) -> np.ndarray:
    if matrix.dtype.kind not in "fiub" or matrix.ndim != 2 or not matrix.size:
        raise ValueError(f"{place}: scores must be numbers [layers, kv_heads], got {matrix.dtype} {list(matrix.shape)}")
    if matrix.size > MAX_ELEMENTS:
        raise ValueError(f"{place}: {list(matrix.shape)} are more scores than {MAX_ELEMENTS}, the most that is read")
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
        if len(rows) * len(row) > MAX_ELEMENTS:
            raise ValueError(f"{path}:{number}: there are more scores than {MAX_ELEMENTS}, the most that is read")
    if not rows:
        raise ValueError(f"{path} holds no scores")
    return np.array(rows, dtype=np.float64)


def _parse_score(text: str, place: str) -> float:
    try:
        score = float(text)
    except ValueError:
        raise ValueError(f"{place}: {shown(text)} is not a number") from None
    if not -_TOLERANCE <= score <= 1.0 + _TOLERANCE:
        raise ValueError(f"{place}: score {one_line(text, 40)} lies outside [0, 1]")
    return score


_SEPARATORS = {".tsv": "\t", ".csv": ","}
_READERS: dict[str, Callable[[Path], tuple[np.ndarray, dict]]] = {".npy": _read_npy, ".pt": _read_pt}
