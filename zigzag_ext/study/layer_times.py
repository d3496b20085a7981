"""What the attention of a layer takes on this machine, by the number of its heads that retrieve: a cost table, measured.

One new token, one row, through the same calls that a cache makes (`store.attend`), over random keys and values. Only differences
between plans are measured: what else a step takes is the same for all of them, and is not in the table.
"""

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _C
from ..attention import ops
from ..attention.chunk import Chunk
from ..attention.store import LayerStore, attend
from ..planning.origin import origin_of

_SETS = 8  # most layers of every kind, in turn: none finds its keys in a cache of the processor from the call before
_SETS_BYTES = 1 << 30  # where one layer of every kind takes less, there are several
_ROUNDS, _WARM_UP = 15, 3
_FILL = 4096  # tokens appended at a time


def measure_costs(
    model, sink: int, window: int, context: int, advance: Callable[[int, int], None] = lambda done, total: None
) -> dict:
    """A cost table (see `planning/costs.py`) for the geometry, dtype and device of `model` at `context` tokens.

    The medians of rounds in which every kind of layer takes its turn, so that a drifting machine touches all of them alike. On a
    GPU the calls are captured in a CUDA graph, as compiled decode steps are.

    Raises:
        ValueError: the layers have no one geometry; what the ops raise where they have no kernel for it.
    """
    geometry, device = origin_of(model.config), model.device
    kv_heads = geometry["kv_heads"]
    shape = (geometry["query_heads"], kv_heads, geometry["head_dim"])
    retrieving = sum(range(kv_heads + 1))  # heads of one layer of each kind
    one_each = _C.kv_bytes(context, retrieving, geometry["head_dim"], model.dtype.itemsize)
    sets = min(max(_SETS_BYTES // one_each, 1), _SETS)
    kinds = [_layers(count, sets, shape, sink, window, context, model.dtype, device) for count in range(kv_heads + 1)]
    samples: list[list[float]] = [[] for _ in kinds]
    with torch.inference_mode():
        runs = [_captured(run) if device.type == "cuda" else run for run in kinds]
        for number in range(_WARM_UP + _ROUNDS):
            for times, run in zip(samples, runs, strict=True):
                spent = _timed(run, device)
                times += [spent / sets] if number >= _WARM_UP else []
            advance(number + 1, _WARM_UP + _ROUNDS)
    medians = [round(statistics.median(times), 6) for times in samples]
    return {"context": [context], "retrieval": [medians[-1]], "streaming": [medians[0]], "mixed": [medians[1:-1]]}


def machine_name(device: torch.device) -> str:
    """The GPU, or the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()} ({threads} thread{'s' if threads > 1 else ''})"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _layers(retrieval: int, sets: int, shape: tuple, sink: int, window: int, context: int, dtype, device) -> Callable[[], None]:
    """A call that decodes one token in `sets` layers, whose first `retrieval` KV heads retrieve."""
    query_heads, kv_heads, head_dim = shape
    q, k, v = (torch.randn(1, heads, 1, head_dim, dtype=dtype, device=device) for heads in (query_heads, kv_heads, kv_heads))
    held = torch.full((1,), context, dtype=torch.int32, device=device)
    chunk = Chunk((held,), None, ops.new_workspace(device), past=context, decodes=True)
    layers = [_stores(retrieval, k, sink, window, context) for _ in range(sets)]

    def run() -> None:
        for stores in layers:
            attend(stores, q, k, v, None, chunk)

    return run


def _stores(retrieval: int, k: Tensor, sink: int, window: int, context: int) -> list[LayerStore]:
    """The stores of one layer, filled: one, or one for each kind of heads."""
    kv_heads = k.shape[1]
    heads = {(0, 0): tuple(range(retrieval)), (sink, window): tuple(range(retrieval, kv_heads))}
    stores = []
    for (first, last), numbers in heads.items():
        if numbers:
            store = LayerStore(first, last, heads=numbers if len(numbers) < kv_heads else None)
            store.allocate(k, context + 1, context + 1)
            _fill(store, len(numbers), context)
            stores.append(store)
    return stores


def _fill(store: LayerStore, heads: int, context: int) -> None:
    """Random keys and values of `context` tokens; a ring gets its first and its last ones, which are all that it keeps."""
    keys, values = torch.randn(2, 1, heads, min(_FILL, context), store.geometry[2], dtype=store.dtype, device=store.device)
    held = torch.zeros(1, dtype=torch.int32, device=store.device)
    starts = {0, max(0, context - _FILL)} if store.window else range(0, context, _FILL)
    for start in sorted(starts):
        held.fill_(start)
        new = slice(0, context - start)
        ops.append(keys[:, :, new], values[:, :, new], *store.caches[:2], held, sink=store.sink, window=store.window)


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _timed(run: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of a call, on the device."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(stop)
