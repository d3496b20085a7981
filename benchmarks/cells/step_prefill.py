"""Times whole prompts through a model; `step.py --phase prefill` runs this.

Chunks of `CHUNK` tokens inside one forward, an empty cache, the logits of the last token only. A first, short prompt loads
kernels and measures the backends (zigzag_ext.attention.routes). The profiler runs along and adds about a microsecond a launch.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from transformers import DynamicCache

import zigzag_ext as zz
from zigzag_ext.hf.cache_argument import cache_argument

from ..timing.model_memory import kv_bytes, peak_bytes, weight_bytes
from ..timing.profile_gpu import profiled, wait
from .models import K, make_plan

CHUNK = 32 * K
WARMUP = 2 * K  # tokens beyond a chunk, so that the warm-up attends a past, too
LONG_RUN, REPEATS = 5.0, 3  # a prompt that takes more seconds is timed once
IMPLS = ("zigzag_eager", "transformers_eager")
CONTEXTS = (128 * K, 320 * K)
PLANS = ("retrieval_100", "exclusive_50")


def cells(impl: str, model, plans: list[str], contexts: list[int], chunk: int) -> Iterator[tuple[str, int, Callable]]:
    """Plan, prompt length and a measurement for every cell; the implementation is on while they are drawn."""
    if impl == "transformers_eager":  # in one shot: a chunk after a past would need a mask of chunk x context
        yield from _cells_of_plan("full", lambda: DynamicCache(config=model.config), model, contexts, chunk)
        return
    for name in plans:
        plan = make_plan(name, model.config)
        with zz.zigzag(model, plan, prefill_chunk=chunk):
            yield from _cells_of_plan(name, lambda plan=plan: zz.ZigzagCache(model.config, plan), model, contexts, chunk)


def _cells_of_plan(name: str, new_cache: Callable, model, contexts: list[int], chunk: int) -> Iterator[tuple[str, int, Callable]]:
    warmed = []

    def measure(context: int) -> Iterator[dict]:
        if not warmed:
            run_prompt(model, new_cache(), min(chunk + WARMUP, context))
            warmed.append(True)
        yield measure_prompt(model, new_cache, context)

    for context in contexts:
        yield name, context, lambda context=context: measure(context)


def run_prompt(model, cache, tokens: int) -> dict:
    """Milliseconds of wall and of kernels, launches, and memory of one prompt of random tokens."""
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), device=model.device)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = 0.0

    def run():
        nonlocal seconds
        wait(model)
        start = time.perf_counter()
        model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        wait(model)
        seconds = time.perf_counter() - start

    gpu_ms, launches = profiled(run, on_gpu)
    memory = {"kv_bytes": kv_bytes(cache), "peak_bytes": peak_bytes(model, cache), "weight_bytes": weight_bytes(model)}
    return {"wall_ms": seconds * 1e3, "gpu_ms": gpu_ms, "launches": launches, **memory}


def measure_prompt(model, new_cache: Callable, context: int) -> dict:
    """The row of one cell: the median of three runs, each on a new cache, or one long run."""
    rows = []
    while len(rows) < REPEATS and not (rows and rows[0]["wall_ms"] > LONG_RUN * 1e3):
        gc.collect()  # gives the memory of the last cache back
        rows.append(run_prompt(model, new_cache(), context))
    middle = {name: statistics.median(row[name] for row in rows) for name in ("wall_ms", "gpu_ms")}
    return {"phase": "prefill", **rows[-1], **middle}
