"""The CSV that every benchmark writes, C++ and Python alike: one row per measurement."""

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path


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
        element = 4 if self.kv_format == "fp32" else 2
        return self.bytes < 2 * self.batch * self.kv_len * self.num_kv_heads * self.head_dim * element


COLUMNS = [field.name for field in fields(Record)]
_TYPES = {field.name: field.type for field in fields(Record)}


class Writer:
    """Writes a CSV file anew and flushes every row, so that an interrupted run keeps what it measured."""

    def __init__(self, path: Path | None):
        self._file = Path(path).open("w", newline="") if path else None
        self._csv = csv.DictWriter(self._file, COLUMNS, lineterminator="\n") if self._file else None
        if self._csv:
            self._csv.writeheader()

    def add(self, record: Record) -> None:
        if self._csv:
            row = asdict(record)
            row.update({name: round(row[name], 3) for name, kind in _TYPES.items() if kind is float})
            self._csv.writerow(row)
            self._file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._file:
            self._file.close()


def read(path: Path) -> list[Record]:
    """Rows of a CSV file. Raises ValueError naming the file if its columns are not COLUMNS, in order."""
    with Path(path).open(newline="") as file:
        rows = csv.reader(file)
        header = next(rows, [])
        if header != COLUMNS:
            raise ValueError(f"{path}: columns are {header}, expected {COLUMNS}")
        return [Record(**{name: _TYPES[name](value) for name, value in zip(COLUMNS, row, strict=True)}) for row in rows]


def write(path: Path, records: Iterable[Record]) -> None:
    with Writer(path) as writer:
        for record in records:
            writer.add(record)
