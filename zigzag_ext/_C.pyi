"""The pybind11 module: plans, the solver and the scheduler of the C++ core. Every core error is a ValueError."""

from collections.abc import Sequence
from typing import TypedDict

from numpy.typing import ArrayLike

HEAD_DIMS: tuple[int, ...]
MAX_GROUP_SIZE: int
MAX_DECODE_QUERIES: int

class BuildInfo(TypedDict):
    version: str
    cuda: bool
    cuda_archs: str
    cpu_isa: str
    compiler: str

def build_info() -> BuildInfo: ...
def attention_workspace_bytes(batch: int, num_q_heads: int, num_kv_heads: int, head_dim: int) -> int: ...
def check_plan(kinds: Sequence[str], sink: int, window: int) -> None: ...

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
        kinds: Sequence[str],
        sink: int,
        window: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
    ) -> None: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def launches_per_step(self) -> int: ...
    def kernel(self, layer: int, q_len: int) -> str: ...
    def slots(self, layer: int, max_len: int) -> int: ...
    def kv_bytes(self, batch: int, max_len: int, kind: str | None = None) -> int: ...
    def all_retrieval_kv_bytes(self, batch: int, max_len: int) -> int: ...
    def workspace_bytes(self, batch: int) -> int: ...
