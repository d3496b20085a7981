"""The one CSV schema of all tasks: a row says how a plan did on a task at a length, with 95% confidence intervals."""

import csv
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean, stdev

from ...planning.plan import Plan
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
    kinds: str  # per layer 0 (retrieval) or 1 (streaming); per KV head, layers separated by "/", for a head-level plan
    sink: int
    window: int
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
        what = (self.model, self.device, self.dtype, self.task, self.kinds, self.sink, self.window)
        return (*what, self.length, self.depth, self.seed, self.prompts)


COLUMNS = [field.name for field in fields(Row)]


def kinds_of(plan: Plan | None, layers: int) -> str:
    """A plan as a string, see `Row.kinds`."""
    if plan is None:
        return "0" * layers
    if plan.mixed_layers:
        return "/".join("".join("10"[head] for head in layer) for layer in plan.retrieval_heads(plan.kv_heads))
    return "".join("1" if kind == "streaming" else "0" for kind in plan.kinds)


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
    """Adds rows to a CSV file, which is made with its header if need be. Raises ValueError if its columns are others."""
    path = Path(path)
    if path.exists():
        _check_header(path)
    else:
        path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    with path.open("a", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        for row in rows:
            lines.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in asdict(row).values())


def read(path: str | os.PathLike) -> list[Row]:
    """Rows of a CSV file. Raises ValueError naming the file if its columns are not `COLUMNS`, or the line that is damaged."""
    _check_header(Path(path))
    text, rows = Path(path).read_text(encoding="utf-8"), []
    if not text.endswith("\n"):  # the last number may be half of one
        raise ValueError(f"{path}:{len(text.splitlines())}: the line has no end, as an interrupted run may leave it")
    with Path(path).open(newline="", encoding="utf-8") as file:
        for number, line in enumerate(csv.DictReader(file), start=2):
            try:
                rows.append(Row(**{name: _VALUE.get(kind, kind)(line[name]) for name, kind in _KINDS.items()}))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}:{number}: {error}") from error
        return rows


def _check_header(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = next(csv.reader(file), [])
    if header != COLUMNS:
        raise ValueError(f"{path}: columns are {header}, expected {COLUMNS}")


_KINDS = {field.name: field.type for field in fields(Row)}
_VALUE = {float | None: lambda text: float(text) if text else None}
