"""Timing: CUDA-graph replays between events on a GPU, a monotonic clock around each call on a CPU; both interleaved."""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Run = Callable[[int], object]  # run(set) does the work of one call on that set of buffers

REPLAYS = 20
MAX_NODES, MIN_NODES = 32, 4  # calls per captured graph
BYTES_PER_REPLAY = 4_000_000_000  # about 1.3 ms of traffic on an H100
WARM_SECONDS = 0.2  # of samples on a GPU that do not count: it comes from checks in float64
HOLD_CYCLES = 400_000  # about 0.2 ms: the queue stays busy while the host enqueues a replay
CPU_SECONDS = 1.0  # of samples per implementation
CPU_MIN_SAMPLES, CPU_MAX_SAMPLES = 15, 2000
COPY_BYTES = {"cuda": 2_000_000_000, "cpu": 250_000_000}


@dataclass(frozen=True)
class Quantiles:
    """Microseconds per call."""

    p20: float
    p50: float
    p80: float


def quantiles(sample: list[float]) -> Quantiles:
    tenths = statistics.quantiles(sample, n=10, method="inclusive")
    return Quantiles(tenths[1], tenths[4], tenths[7])


class GraphClock:
    """One implementation, captured: graphs that together run through all sets."""

    def __init__(self, run: Run, num_sets: int, bytes_per_call: int):
        self.run = run  # owns what the graphs read: workspaces, page tables, copies of the queries
        most = min(max(BYTES_PER_REPLAY // bytes_per_call, MIN_NODES), MAX_NODES)
        # Graphs of equal size that share out the sets, or one that runs through them several times. The remainder of the
        # division stays unused: a graph that wrapped around would touch what the next graph reads first.
        num_graphs = -(-num_sets // most)
        self.nodes = most // num_sets * num_sets if num_graphs == 1 else num_sets // num_graphs
        sets = itertools.cycle(range(num_sets))
        self.graphs = [self._capture(run, sets) for _ in range(num_graphs)]
        self.positions = len(self.graphs)
        self.start, self.stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for graph in self.graphs:
            graph.replay()

    def _capture(self, run: Run, sets) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(self.nodes):
                run(next(sets))
        return graph

    def sample(self, position: int) -> float:
        torch.cuda._sleep(HOLD_CYCLES)
        self.start.record()
        self.graphs[position].replay()
        self.stop.record()
        torch.cuda.synchronize()
        return self.start.elapsed_time(self.stop) * 1e3 / self.nodes


class CallClock:
    """One implementation on the CPU: every sample is one call."""

    def __init__(self, run: Run, num_sets: int, bytes_per_call: int):
        self.run, self.positions = run, num_sets
        self.run(0)

    def sample(self, position: int) -> float:
        start = time.perf_counter_ns()
        self.run(position)
        return (time.perf_counter_ns() - start) * 1e-3


def make_clock(device: str, run: Run, num_sets: int, bytes_per_call: int) -> GraphClock | CallClock:
    return (GraphClock if device == "cuda" else CallClock)(run, num_sets, bytes_per_call)


def measure(device: str, clocks: dict[str, GraphClock | CallClock]) -> dict[str, Quantiles]:
    """Samples every clock in turn, round after round, so that a drifting machine touches all of them alike.

    Clocks share their buffers, so they share one rotation: none finds in a cache what its predecessor has just read.
    """
    samples: dict[str, list[float]] = {name: [] for name in clocks}
    turn = itertools.count()
    begin = time.perf_counter()
    while device == "cuda" and time.perf_counter() - begin < WARM_SECONDS:
        for clock in clocks.values():
            clock.sample(next(turn) % clock.positions)
    begin = time.perf_counter()
    for rounds in itertools.count():
        if device == "cuda" and rounds == REPLAYS:
            break
        if device == "cpu" and rounds >= CPU_MIN_SAMPLES:
            elapsed = time.perf_counter() - begin
            if rounds == CPU_MAX_SAMPLES or elapsed > CPU_SECONDS * max(1, len(clocks)):
                break
        for name, clock in clocks.items():
            samples[name].append(clock.sample(next(turn) % clock.positions))
    return {name: quantiles(sample) for name, sample in samples.items()}


def copy_bandwidth(device: str) -> float:
    """GB/s of reading one array and writing another, bytes read plus bytes written.

    By a kernel: in a CUDA graph, `copy_` goes to a copy engine, which reaches 2.4 of 3.0 TB/s on an H100.
    """
    size = COPY_BYTES[device]
    pairs = [tuple(torch.ones(size // 4, dtype=torch.int32, device=device) for _ in range(2)) for _ in range(2)]
    clock = make_clock(device, lambda i: torch.bitwise_not(pairs[i][1], out=pairs[i][0]), len(pairs), 2 * size)
    return 2 * size / measure(device, {"copy": clock})["copy"].p50 * 1e-3


def read_bandwidth(device: str) -> float:
    """GB/s of reading an array: the sum of float32 numbers."""
    size = COPY_BYTES[device]
    arrays = [torch.ones(size // 4, dtype=torch.float32, device=device) for _ in range(2)]
    total = torch.sum(arrays[0], dim=0)  # loads the kernel, which a capture must not
    clock = make_clock(device, lambda i: torch.sum(arrays[i], dim=0, out=total), len(arrays), size)
    return size / measure(device, {"read": clock})["read"].p50 * 1e-3
