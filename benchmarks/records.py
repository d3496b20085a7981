"""The CSV that every benchmark writes, C++ and Python alike: one row per measurement."""

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from scenarios import token_bytes


@dataclass(frozen=True)
class Record:
    commit: str
    gpu: str  # or the CPU model and its number of threads
    driver: str  # "-" on a CPU
    torch: str  # "-" from the C++ programs
    op: str  # decode_full, decode_stream
    impl: str  # zigzag, a peer, or read: a pure read of the same bytes
    scenario: str
    kv_format: str
    batch: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    q_len: int
    kv_len: int  # of the longest row
    sink: int
    window: int
    p20_us: float
    p50_us: float
    p80_us: float
    bytes: int  # K and V of the attended keys
    gbps: float  # bytes / p50
    pct_copy: float  # gbps in percent of the copy bandwidth (read + write) measured in the same run

    @property
    def shape(self) -> tuple:
        """What makes two rows the same problem, whoever measured it. The bytes tell ragged batches from uniform ones."""
        heads = (self.batch, self.num_q_heads, self.num_kv_heads, self.head_dim)
        return (self.op, self.kv_format, *heads, self.q_len, self.kv_len, self.sink, self.window, self.bytes)

    @property
    def ragged(self) -> bool:
        """Whether some row is shorter than kv_len: only then are there fewer bytes than batch * kv_len keys take."""
        return self.bytes < self.batch * self.kv_len * self.num_kv_heads * token_bytes(self.kv_format, self.head_dim)


@dataclass(frozen=True)
class StepRecord:
    """One decode step of a whole model. Written by step.py; its files are named step*.csv."""

    commit: str
    gpu: str
    driver: str
    torch: str
    transformers: str
    model: str
    phase: str  # step: a loop of forwards; generate: model.generate()
    context: int  # tokens held before the first measured step; faked: see step.py
    plan: str
    impl: str
    wall_ms: float  # per token
    gpu_ms: float  # sum of the kernels' times per token; 0 where it was not measured
    launches: float  # kernels and copies on the GPU per token; 0 where they were not counted
    kv_bytes: int
    peak_bytes: int  # allocated at most, weights included; 0 on a CPU


@dataclass(frozen=True)
class QualityRecord:
    """What a KV format does to the demo model's answers. Written by kv_quality.py; its files are named kv_quality*.csv."""

    commit: str
    machine: str  # the GPU, or the CPU model and its number of threads
    torch: str
    model: str
    dtype: str  # of the model, and of what is not quantised
    plan: str  # full, or the demo's good plan
    kv_format: str
    key_smoothing: bool
    impl: str  # zigzag, or emulated in torch
    task: str  # perplexity or passkey
    tokens: int  # per sample
    samples: int
    exact: float  # share of the samples all of whose targets are the likeliest tokens, with its Wilson interval
    exact_low: float
    exact_high: float
    logprob: float  # natural, mean per target token; its normal interval is one of samples, which all rows of a task share
    logprob_low: float
    logprob_high: float

    @property
    def origin(self) -> tuple:
        """What rows of one table share."""
        return (self.machine, self.torch, self.model, self.dtype)

    @property
    def cell(self) -> tuple:
        """What was measured, whichever commit did it."""
        return (*self.origin, *self.line, self.task, self.tokens, self.samples)

    @property
    def line(self) -> tuple:
        return (self.plan, self.kv_format, self.key_smoothing, self.impl)


COLUMNS = [field.name for field in fields(Record)]
_PARSE = {bool: lambda text: {"True": True, "False": False}[text]}


@contextmanager
def writer(path: Path | None, kind: type = Record) -> Iterator[Callable]:
    """Yields add(record of `kind`), which writes a row of a new CSV file and flushes it. Without a path nothing is written.

    An interrupted run keeps what it measured.
    """
    if path is None:
        yield lambda record: None
        return
    with Path(path).open("w", newline="") as file:
        rows = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
        rows.writeheader()
        file.flush()

        def add(record) -> None:
            digits = 4 if kind is QualityRecord else 3
            rows.writerow(
                {name: round(value, digits) if isinstance(value, float) else value for name, value in asdict(record).items()}
            )
            file.flush()

        yield add


def read(path: Path) -> list[Record]:
    """Rows of a CSV file. Raises ValueError naming the file if its columns are not COLUMNS, in order."""
    return read_as(path, Record)


def read_as(path: Path, kind: type) -> list:
    """Rows of `kind` of a CSV file. Raises ValueError naming the file if its columns are not the fields of `kind`, in order."""
    types = {field.name: _PARSE.get(field.type, field.type) for field in fields(kind)}
    with Path(path).open(newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if header != list(types):
            raise ValueError(f"{path}: columns are {header}, expected {list(types)}")
        return [kind(**{name: types[name](value) for name, value in zip(types, row, strict=True)}) for row in rows]


def write(path: Path, records: Iterable[Record]) -> None:
    with writer(path) as add:
        for record in records:
            add(record)
