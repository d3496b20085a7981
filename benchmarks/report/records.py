"""The CSV that every benchmark writes, C++ and Python alike: one row per measurement."""

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..cells.scenarios import token_bytes


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
class ModelRecord:
    """What records of a whole model begin with."""

    commit: str
    gpu: str
    driver: str
    torch: str
    transformers: str
    model: str


@dataclass(frozen=True)
class StepRecord(ModelRecord):
    """A decode step, or the whole prompt, of a whole model. Written by step.py; its files are named step*.csv."""

    phase: str  # step: a loop of forwards; generate: model.generate(); prefill: a prompt, from an empty cache
    context: int  # tokens held before the first measured step (faked: see step.py), or tokens of the prompt
    plan: str
    impl: str
    wall_ms: float  # per token; prefill: per prompt, and so are the next two
    gpu_ms: float  # sum of the kernels' times per token; 0 where it was not measured
    launches: float  # kernels and copies on the GPU per token; 0 where they were not counted
    kv_bytes: int
    peak_bytes: int  # in use at most, weights and KV included; 0 on a CPU
    weight_bytes: int

    @property
    def beside_bytes(self) -> int:
        """In use at most beside weights and KV: activations and scratch."""
        return self.peak_bytes - self.weight_bytes - self.kv_bytes


@dataclass(frozen=True)
class SpeculateRecord(StepRecord):
    """Speculative decoding of a whole model. Written by speculate.py; its files are named speculate*.csv.

    phase: round: rounds of a generate() call; verify: a forward of `tokens` new tokens per row; draft: a step of the streaming
    draft; generate: plain generate(). wall_ms is that of a round, of a forward, of a step, of a token.
    """

    batch: int
    draft: str  # what was drafted; "-" where nothing was
    tokens: int  # most tokens of a draft; verify: new tokens per row
    acceptance: float  # chance of a drafted token to be taken for right, whatever it is: random weights have no text
    rounds: int
    ms_per_token: float  # wall time per token of a row


@dataclass(frozen=True)
class StartRecord(ModelRecord):
    """The first token of a compiled step. Written by start.py; its files are named start*.csv."""

    plan: str
    cache: str  # of the compiler: empty, or warm with what another process has left
    batch: int  # 1, then 2 in the same process
    seconds: float  # from the call of generate() with a short prompt to the end of the first step


@dataclass(frozen=True)
class CompressedRecord(ModelRecord):
    """Steps behind a compressed prompt. Written by compressed_steps.py; its files are named compressed*.csv."""

    plan: str
    method: str  # of the choice, with its budget
    context: int  # tokens of the prompt
    batch: int
    kept: int  # tokens of a row that each retrieval layer keeps
    prompt_s: float  # of reading the prompt
    choice_s: float  # of choosing, and of giving memory back
    step_ms: float  # per token of generate() behind it
    kept_ms: float  # the same on a cache that never held more than `kept` tokens
    kv_bytes: int  # by the cache's own report
    driver_bytes: int  # by the driver, with all else that the prompt has left behind; 0 on a CPU
    budget_bytes: int  # of the kept tokens, of rings, and of a page more for each buffer of each row
    new_captures: int  # steps that were captured again for a second prompt on the same cache


@dataclass(frozen=True)
class ServeRecord(ModelRecord):
    """Many requests at once. Written by serve.py, which has the scenarios; its files are named serve*.csv. 0: not measured."""

    scenario: str
    plan: str
    kv_format: str
    impl: str  # engine: zz.Engine; generate: model.generate(); generate_batch: transformers' own; *_server: over HTTP
    rows: int  # requests at once
    prompt: int  # tokens of each
    new_tokens: int  # that were timed, of all requests
    wall_s: float  # in which they came
    tokens_per_s: float
    first_p50_s: float  # from a request to its first token
    first_p99_s: float
    between_p50_ms: float  # from a token of a request to its next
    between_p99_ms: float
    kv_bytes: int  # what rows held at the end of what was timed, rings included
    cached_tokens: int  # of all prompts, that an earlier request had left


@dataclass(frozen=True)
class PrefillRecord:
    """A chunk of a prompt through one layer. Written by prefill.py; its files are named prefill*.csv."""

    commit: str
    gpu: str
    driver: str
    torch: str
    impl: str
    scenario: str
    batch: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    tokens: int  # of the chunk
    past: int  # tokens held before it
    sink: int
    window: int
    p20_us: float
    p50_us: float
    p80_us: float
    flops: int  # of the visible pairs of query and key, two products
    tflops: float  # flops / p50


@dataclass(frozen=True)
class CapacityRecord:
    """The longest contexts that one GPU decodes. Written by capacity.py."""

    commit: str
    gpu: str
    driver: str
    torch: str
    transformers: str
    torchao: str  # "-" where the weights are not quantised
    model: str
    weights: str  # int8, plain
    plan: str
    kv_format: str
    impl: str
    context: int  # tokens held before the first measured step: random keys and values, stored by the append op
    new_tokens: int  # decoded by the whole model
    wall_ms: float  # per token, in a loop of forwards
    generate_ms: float  # per token, in model.generate()
    gpu_ms: float  # sum of the kernels' times per token; 0 on a CPU
    launches: float
    read_gbps: float  # of reading an array, measured before the caches took the memory
    floor_ms: float  # what a token reads, weights and KV, at that rate
    weight_bytes: int  # embedding included, which a step reads one row of
    kv_bytes: int
    peak_bytes: int  # of torch and the growing buffers
    used_bytes: int  # of the GPU, by all there is, after the last token; 0 on a CPU
    heads_checked: int  # KV heads of sampled layers, whose attention over the whole context was compared with the reference
    largest_error_pct: float  # relative, of those heads


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
def writer(path: Path | None, kind: type = Record, go_on: bool = False) -> Iterator[Callable]:
    """Yields add(record of `kind`), which writes a row of a CSV file and flushes it. Without a path nothing is written.

    The file is written anew, or with `go_on` rows are added to what it holds. An interrupted run keeps what it measured.
    """
    if path is None:
        yield lambda record: None
        return
    new = not (go_on and Path(path).exists())
    with Path(path).open("w" if new else "a", newline="") as file:
        rows = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
        if new:
            rows.writeheader()
            file.flush()

        def add(record) -> None:
            digits = 4 if kind is QualityRecord else 3
            rows.writerow(
                {name: round(value, digits) if isinstance(value, float) else value for name, value in asdict(record).items()}
            )
            file.flush()

        yield add


def read(path: Path, kind: type = Record) -> list:
    """Rows of a CSV file of `kind`.

    Raises ValueError naming the file if its columns are not the fields of `kind`, in order, and with the line where one is
    damaged: a field too few or too many or that is no such value, or no end, as an interrupted run may leave the last one.
    """
    types = {field.name: _PARSE.get(field.type, field.type) for field in fields(kind)}
    lines = Path(path).read_text().splitlines(keepends=True)
    header = next(csv.reader(lines[:1]), [])
    if header != list(types):
        raise ValueError(f"{path}: columns are {header}, expected {list(types)}")
    records = []
    for number, line in enumerate(lines[1:], start=2):
        row = next(csv.reader([line]), [])
        try:
            if len(row) != len(types) or not line.endswith("\n"):  # without an end, the last number may be half of one
                raise ValueError(f"it has {len(row)} of {len(types)} fields and ends in {line[-12:]!r}")
            records.append(kind(**{name: types[name](value) for name, value in zip(types, row, strict=True)}))
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path}:{number}: the line is damaged, delete it or measure again: {error}") from error
    return records


def held(path: Path | None, kind: type, origin: dict[str, str]) -> list:
    """Rows that a file, if there is one, holds already of this origin (commit, processor, versions): a run goes on after them."""
    if path is None or not Path(path).exists():
        return []
    return [row for row in read(path, kind) if origin.items() <= asdict(row).items()]


def write(path: Path, records: Iterable[Record]) -> None:
    with writer(path) as add:
        for record in records:
            add(record)
