"""Times steps behind a compressed prompt of a whole model:  python -m benchmarks.compressed_steps --csv compressed_h200.csv

Weights and prompts are random, which changes no time. A whole prompt is read, its retrieval layers choose what they keep, and
generate() goes on in compiled steps; beside it stands a cache that never held more than was kept. The memory of the cache is
counted by its own report and by what the driver has less. A second, shorter prompt on the same cache tells whether what was
captured for the first still serves.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import transformers

import zigzag_ext as zz
from zigzag_ext.hf.cache_argument import cache_argument
from zigzag_ext.hf.compiled import _Step

from .cells.arguments import counts, model_parser, token_count
from .cells.fake_context import fake_zigzag
from .cells.models import PLANS, K, build_model, even_plan, make_plan
from .report.records import CompressedRecord, writer
from .timing import machine
from .timing.profile_gpu import wait

NEW, FEW, REPEATS = 64, 4, 3  # tokens that are timed, and of the shorter call that is taken off
MARGIN = (NEW + 2 * FEW) * (REPEATS + 1)
WARM_UP = 2 * K  # tokens of the prompt that loads kernels


class Rows:
    """A cache of `batch` rows and the tokens it holds, and one more, which it does not."""

    def __init__(self, model, cache, ids):
        self.model, self.cache, self.ids = model, cache, ids

    def read(self, ids) -> float:
        """Seconds of reading a prompt."""
        self.ids = ids

        def forward():
            self.model(ids[:, :-1], **cache_argument(self.model, self.cache), use_cache=True, logits_to_keep=1)

        return seconds(self.model, forward)

    def generate(self, new_tokens: int) -> None:
        options = cache_argument(self.model, self.cache) | {"do_sample": False, "eos_token_id": None}
        mask = torch.ones_like(self.ids)
        self.ids = self.model.generate(self.ids, attention_mask=mask, max_new_tokens=new_tokens, **options)

    def step_ms(self) -> float:
        """Milliseconds per token of generate(); what a call costs whatever its length drops out of the difference of two."""
        times = []
        for _ in range(REPEATS):
            few, many = (seconds(self.model, partial(self.generate, n)) for n in (FEW, FEW + NEW))
            times.append((many - few) / NEW * 1e3)
        return statistics.median(times)


def seconds(model, run: Callable[[], None]) -> float:
    wait(model)
    start = time.perf_counter()
    run()
    wait(model)
    return time.perf_counter() - start


def used_bytes(model) -> int:
    """Memory of the GPU in use, by the driver, without what torch keeps for later; 0 on a CPU."""
    gc.collect()
    if model.device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


@contextmanager
def captures() -> Iterator[list]:
    """A list that gets an entry for every captured step."""
    found, capture = [], _Step._capture
    _Step._capture = lambda self, beside: found.append(self) or capture(self, beside)
    try:
        yield found
    finally:
        _Step._capture = capture


def random_ids(model, batch: int, tokens: int):
    return torch.randint(0, model.config.vocab_size, (batch, tokens + 1), device=model.device)


def budget_bytes(cache, kept: int, batch: int) -> int:
    """What the budget allows: the tokens kept in retrieval layers, rings as they are, and a page of each buffer of each row."""
    full = [store for layer in cache.layers for store in layer.stores if not store.window]
    rings = sum(store.memory_bytes for layer in cache.layers for store in layer.stores if store.window)
    pages = sum(2 << 20 for store in full for _ in store.buffers) * batch if cache.seq_lens.is_cuda else 0
    return rings + pages + sum(store.kv_bytes(kept) for store in full)


def measure(model, plan: zz.Plan, method, context: int, batch: int) -> dict:
    """One row: a compressed prompt, and a cache of the kept length."""
    before = used_bytes(model)
    cache = zz.ZigzagCache(model.config, plan, max_len=context + MARGIN, compress=method)
    rows = Rows(model, cache, None)
    prompt_s = rows.read(random_ids(model, batch, context))
    choice_s = seconds(model, cache.compress)
    kept = next(iter(cache.compressed.values()))[0]
    found = {"prompt_s": prompt_s, "choice_s": choice_s, "kept": kept, "kv_bytes": cache.memory_bytes()}
    found |= {"driver_bytes": used_bytes(model) - before, "budget_bytes": budget_bytes(cache, kept, batch)}
    rows.generate(FEW)
    found["step_ms"] = rows.step_ms()
    with captures() as again:
        cache.reset()
        rows.read(random_ids(model, batch, context // 4))
        rows.generate(FEW)
    del rows, cache
    gc.collect()
    short = Rows(model, fake_zigzag(model, plan, kept, MARGIN, batch), random_ids(model, batch, kept))
    short.generate(FEW)
    return found | {"new_captures": len(again), "kept_ms": short.step_ms()}


def main(argv: list[str] | None = None) -> int:
    parser = model_parser(__doc__, "compressed")
    parser.add_argument("--context", type=token_count, default=128 * K, help="tokens of the prompt; default 128K")
    parser.add_argument("--batch", type=counts, default=[1, 8], help="rows, separated by commas; default 1, 8")
    parser.add_argument("--plan", choices=[name for name in PLANS if not name.startswith("heads")], default="exclusive_50")
    parser.add_argument("--budget", type=float, default=0.12, help="share of the prompt that retrieval layers keep; default 0.12")
    parser.add_argument("--eager", action="store_true", help="without compiled steps")
    args = parser.parse_args(argv)
    origin = {"commit": args.commit, "gpu": machine.processor(args.device), "driver": machine.driver(args.device)}
    origin |= {"torch": torch.__version__, "transformers": transformers.__version__, "model": args.model}
    method = zz.PromptWindows(budget=args.budget)
    model = build_model(args.model, args.device)
    plan = make_plan(args.plan, model.config)
    exact = zz.zigzag(model, even_plan(model.config.num_hidden_layers, 1.0), compile=not args.eager)
    with torch.no_grad(), exact, writer(args.csv, CompressedRecord, go_on=True) as add:
        warm = Rows(model, zz.ZigzagCache(model.config, plan, max_len=WARM_UP, compress=method), None)
        warm.read(random_ids(model, 1, WARM_UP))
        warm.cache.compress()
        del warm
        for batch in args.batch:
            row = measure(model, plan, method, args.context, batch)
            add(CompressedRecord(**origin, plan=args.plan, method=str(method), context=args.context, batch=batch, **row))
            print(f"{args.model} {args.plan} {args.context} x {batch}: {row}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
