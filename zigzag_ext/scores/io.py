"""Reading head scores from files."""

import math
import os
from pathlib import Path

import numpy as np

DUO_SCORES = "full_attention_heads.tsv"
_TOLERANCE = 0.01  # trained gates overshoot [0, 1] slightly: published files go down to -1.4e-3


def load_scores(path: str | os.PathLike) -> np.ndarray:
    """Reads head scores from a DuoAttention folder or a table of numbers.

    Args:
        path: a folder as DuoAttention publishes them (`full_attention_heads.tsv` beside a `config.json`; the latter describes
            the identification run and is not needed), or a text file with one row per layer and one column per KV head,
            separated by tabs or spaces. Empty lines and lines that start with # are skipped.

    Returns:
        float64 [layers, kv_heads], clipped to [0, 1] as DuoAttention does.

    Raises:
        FileNotFoundError: there is nothing at `path`, or the folder holds no scores.
        ValueError: a row is ragged, a value is no number or lies outside [-0.01, 1.01], or there are no rows; the message
            names file and line.

    Source of the format: https://github.com/mit-han-lab/duo-attention (attn_patterns).
    """
    path = Path(path)
    if path.is_dir():
        path = path / DUO_SCORES
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent} is not a DuoAttention folder: it has no {DUO_SCORES}")
    elif not path.exists():
        raise FileNotFoundError(f"there are no scores at {path}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file; supported: a DuoAttention folder, or a table of numbers (.tsv)") from error
    return np.clip(_parse_rows(lines, path), 0.0, 1.0)


def _parse_rows(lines: list[str], path: Path) -> np.ndarray:
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        row = [_parse_score(text, f"{path}:{number}") for text in line.split()]
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
    if math.isnan(score) or not -_TOLERANCE <= score <= 1.0 + _TOLERANCE:
        raise ValueError(f"{place}: score {text} lies outside [0, 1]")
    return score
