"""The pybind11 module: plans, the solver, the scheduler and growing memory of the C++ core. Every core error is a ValueError,
except that memory running out is a MemoryError."""

from collections.abc import Sequence
from typing import TypedDict

from numpy.typing import ArrayLike

HEAD_DIMS: tuple[int, ...]
MAX_GROUP_SIZE: int
MAX_DECODE_QUERIES: int
WORKSPACE_BYTES: int

class BuildInfo(TypedDict):
    version: str
    cuda: bool
    cuda_archs: str
    cpu_isa: str
    compiler: str

class KvFormatInfo(TypedDict):
    bits: int
    code_dtype: str
    scale_bytes: int

class DecodePlan(TypedDict):
    gpu: str
    kernel: str
    blocks: int
    sms: int
    warps: int
    stages: int
    team: int
    cluster: int
    spread: int
    merge: str
    one_token: bool
    shared_bytes: int
    bytes: int
    read_us: float

def build_info() -> BuildInfo: ...
def known_gpus() -> tuple[str, ...]: ...
def decode_plan(
    gpu: str,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kv_len: int,
    q_len: int = 1,
    batch: int = 1,
    kv_format: str = "none",
    sink: int = 0,
    window: int = 0,
) -> DecodePlan: ...
def prefill_plan(
    arch: int,
    sm_count: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    q_len: int,
    slots: int,
    batch: int = 1,
    k_format: str = "none",
    v_format: str = "none",
    window: int = 0,
) -> dict[str, str | int]: ...
def environment() -> dict[str, tuple[str, str]]: ...
def readable_slots(length: int, batch: int, num_kv_heads: int) -> int: ...
def formats() -> dict[str, KvFormatInfo]: ...
def kv_bytes(
    slots: int,
    num_kv_heads: int,
    head_dim: int,
    element_bytes: int,
    kv_format: tuple[str, str] = ("none", "none"),
    value_dim: int | None = None,
    batch: int = 1,
) -> int: ...
def cache_slots(kind: str, sink: int, window: int, max_len: int, rollback: int = 0) -> int: ...
def check_plan(
    kinds: Sequence[str | Sequence[str]], sink: int, window: int, layer_sizes: Sequence[tuple[int, int] | None] = ()
) -> None: ...

class Solution:
    @property
    def kinds(self) -> list[str]: ...
    @property
    def objective_value(self) -> float: ...
    @property
    def retained_score(self) -> float: ...
    @property
    def layer_values(self) -> list[float]: ...
    @property
    def mask_distance(self) -> int: ...
    @property
    def mask_heads(self) -> int: ...

class CostBudget:
    def __init__(self, name: str, retrieval: Sequence[int], streaming: Sequence[int], limit: int, unit: float) -> None: ...

class SolveOptions:
    objective: str
    retrieval_layers: int | None
    costs: CostBudget | None
    force_retrieval: list[int]
    force_streaming: list[int]
    max_streaming_run: int | None
    stages: list[int]
    threshold: float | None
    sparsity: float | None
    top_heads: int | None
    values: list[float]

def solve(scores: ArrayLike, options: SolveOptions) -> Solution: ...
def count_retrieval_layers(retrieval_ratio: float, layers: int) -> int: ...
def objectives() -> dict[str, str]: ...

class Scheduler:
    def __init__(
        self,
        kinds: Sequence[str | Sequence[str]],
        sink: int,
        window: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        kv_format: tuple[str, str] = ("none", "none"),
        ring_kv_format: tuple[str, str] = ("none", "none"),
        rollback: int = 0,
        layer_sizes: Sequence[tuple[int, int] | None] = (),
    ) -> None: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def launches_per_step(self) -> int: ...
    def kernel(self, layer: int, q_len: int, kind: str | None = None) -> str: ...
    def slots(self, layer: int, max_len: int, kind: str | None = None) -> int: ...
    def heads(self, layer: int) -> dict[str, tuple[int, ...]]: ...
    def kv_bytes(self, batch: int, max_len: int, kind: str | None = None) -> int: ...
    def all_retrieval_kv_bytes(self, batch: int, max_len: int) -> int: ...

class VirtualBuffer:
    def __init__(self, rows: int, row_bytes: int, device: int | None = None, unit_bytes: int = 1) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    @property
    def __cuda_array_interface__(self) -> dict[str, object]: ...
    def commit(self, row_bytes: int) -> None: ...
    def commit_row(self, row: int, row_bytes: int) -> None: ...
    def growth(self, row_bytes: int) -> int: ...
    def row_growth(self, row: int, row_bytes: int) -> int: ...
    def shrink(self, row_bytes: int) -> None: ...
    def shrink_row(self, row: int, row_bytes: int) -> None: ...
    def release(self) -> None: ...
    def extended(self, row_bytes: int) -> VirtualBuffer: ...
    def committed_row_bytes(self, row: int) -> int: ...
    @property
    def data_ptr(self) -> int: ...
    @property
    def device(self) -> int | None: ...
    @property
    def rows(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def row_stride(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    @property
    def reserved_bytes(self) -> int: ...
    @property
    def committed_bytes(self) -> int: ...

def host_free_bytes(root: str = "") -> int: ...
def watch_captures(device: int, streams: Sequence[int]) -> None: ...
