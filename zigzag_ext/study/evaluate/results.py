"""The one CSV schema of all tasks: a row says how a plan did on a task at a length, with 95% confidence intervals."""

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from statistics import fmean, stdev

from ...planning.plan import Plan
from ...planning.reading import MIB, decode, located, parse_csv, read_text, shown
from ...planning.writing import is_stream, update, write
from .scoring import Verdict

_Z = 1.959964  # two-sided 95% of a normal distribution


@dataclass(frozen=True)
class Row:
    """Log-probabilities are natural, mean per target token: exp(-logprob) is the perplexity of the targets."""

    model: str
    device: str
    dtype: str
    task: str
    plan: str  # its name; "full" is full attention
    kinds: str  # per full-attention layer 0 (retrieval) or 1 (streaming); for a head-level plan per KV head, "/" between layers
    sink: int
    window: int
    compress: str  # how prompts were compressed, as str() of the method has it; nothing: not at all
    length: int  # tokens of a sample, answers included
    depth: float | None  # of the (first) needle; None: mixed or none
    seed: int
    prompts: int
    exact: float  # share of the prompts all of whose target tokens are the likeliest ones
    exact_low: float  # Wilson interval
    exact_high: float
    logprob: float
    logprob_low: float  # normal interval of the mean over prompts
    logprob_high: float

    @property
    def cell(self) -> tuple:
        """What was measured, whatever the plan was called: rows of one cell are the same measurement, of plain caches."""
        what = (self.model, self.device, self.dtype, self.task, self.kinds, self.sink, self.window, self.compress)
        return (*what, self.length, self.depth, self.seed, self.prompts)


COLUMNS = [field.name for field in fields(Row)]


def kinds_of(plan: Plan) -> str:
    """A plan as a string, see `Row.kinds`. Native layers are not told: they belong to the model."""
    if plan.mixed_layers:
        heads = plan.retrieval_heads(plan.kv_heads)
        return "/".join("".join("10"[head] for head in heads[layer]) for layer in plan.full_layers)
    return "".join("1" if plan.kinds[layer] == "streaming" else "0" for layer in plan.full_layers)


def statistics(verdicts: Sequence[Verdict]) -> dict:
    """The measured columns of a row."""
    low, high = wilson(sum(verdict.exact for verdict in verdicts), len(verdicts))
    logprobs = [verdict.logprob for verdict in verdicts]
    mean = fmean(logprobs)
    half = _Z * stdev(logprobs) / math.sqrt(len(logprobs)) if len(logprobs) > 1 else math.inf
    return {
        "prompts": len(verdicts),
        "exact": fmean(verdict.exact for verdict in verdicts),
        "exact_low": low,
        "exact_high": high,
        "logprob": mean,
        "logprob_low": mean - half,
        "logprob_high": mean + half,
    }


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95% confidence interval of a proportion; it never leaves [0, 1] and has a width at 0 and at `trials` hits as well.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927), https://doi.org/10.1080/01621459.1927.10502953.
    """
    share, z2 = hits / trials, _Z * _Z
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = _Z / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(center - half, 0.0), min(center + half, 1.0)


def append(path: str | os.PathLike, rows: Iterable[Row]) -> None:
    """Adds rows to a CSV file, which is made with its header if need be: all of them or none, beside those of other processes.

    What is not a regular file (a pipe, /dev/null) gets the rows alone, or the header if there are no rows.

    Raises:
        ValueError: the file has other columns, or its last line has no end; or a row is one that `read` would refuse. OSError: it
            cannot be written. The file is then as it was.
    """
    lines, header = io.StringIO(), ",".join(COLUMNS) + "\n"
    written = csv.writer(lines, lineterminator="\n")
    for row in rows:
        values = [f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value) for value in astuple(row)]
        _row(values)
        written.writerow(values)

    def longer(old: bytes | None) -> bytes:
        if not old:
            return (header + lines.getvalue()).encode()
        _check_table(path, decode(path, _WHAT, old))
        return old + lines.getvalue().encode()

    if is_stream(path):
        write(path, (lines.getvalue() or header).encode())
    else:
        update(path, longer, _WHAT, MAX_BYTES)


def read(path: str | os.PathLike) -> list[Row]:
    """Rows of a CSV file. Raises ValueError naming the file if its columns are not `COLUMNS`, or the line that is damaged."""
    rows = []
    for number, values in _check_table(path, read_text(path, _WHAT, MAX_BYTES)):
        with located(f"{path}:{number}"):
            rows.append(_row(values))
    return rows


def _check_table(path: str | os.PathLike, text: str) -> list[tuple[int, list[str]]]:
    """The numbered lines below the header. Raises ValueError if that is another, or a line is damaged as a whole."""
    (_, header), *lines = parse_csv(path, text) or [(1, [])]
    if header != COLUMNS:
        raise ValueError(f"{path}: columns are {shown(header)}, expected {COLUMNS}")
    if not text.endswith("\n"):  # the last number may be half of one
        count = len(text.splitlines())
        raise ValueError(f"{path}:{count}: the line has no end, as an interrupted run may leave it; complete or delete it")
    return lines


def _row(values: Sequence[str]) -> Row:
    """Raises ValueError that names the column whose value no row can have."""
    if len(values) != len(COLUMNS):
        raise ValueError(f"{len(values)} values, expected {len(COLUMNS)}")
    found = {}
    for (name, kind), text in zip(_KINDS.items(), values, strict=True):
        try:
            found[name] = _VALUE.get(kind, kind)(text)
        except ValueError:
            raise ValueError(f"{name} must be a number, got {shown(text)}") from None
        expected, holds = _RANGES[name]
        if not holds(found[name]):
            raise ValueError(f"{name} must be {expected}, got {shown(text)}")
    return Row(**found)


def _count(least: int) -> tuple[str, Callable[[int], bool]]:
    return f"an integer from {least} to 2^53", lambda value: least <= value <= 1 << 53


_WHAT = "a table of evaluation results"
MAX_BYTES = 64 * MIB
_KINDS = {field.name: field.type for field in fields(Row)}
_VALUE = {float | None: lambda text: float(text) if text else None}
_TEXT = "1 to 1000 printable characters", lambda text: 0 < len(text) <= 1000 and text.isprintable()
_SHARE = "from 0 to 1", lambda value: 0 <= value <= 1
_LOGPROB = "nan, inf or within 1e9 of 0", lambda value: not abs(value) > 1e9 or math.isinf(value)
_RANGES: dict[str, tuple[str, Callable]] = {
    **dict.fromkeys(("model", "device", "dtype", "task", "plan"), _TEXT),
    "kinds": ("0 or 1 per layer, or per KV head with / between layers", re.compile(r"[01]+(/[01]+)*").fullmatch),
    "sink": _count(0),
    "window": _count(0),
    "compress": ("up to 1000 printable characters", lambda text: len(text) <= 1000 and text.isprintable()),
    "length": _count(1),
    "seed": ("an integer within 2^63 of 0", lambda seed: abs(seed) < 1 << 63),
    "prompts": _count(1),
    "depth": ("from 0 to 1, or nothing", lambda depth: depth is None or 0 <= depth <= 1),
    **dict.fromkeys(("exact", "exact_low", "exact_high"), _SHARE),
    **dict.fromkeys(("logprob", "logprob_low", "logprob_high"), _LOGPROB),
}
