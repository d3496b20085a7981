"""Times a decode step of a whole model, in a loop of forwards and in generate():  python -m benchmarks.step --csv step.csv

The model has random weights and the context is faked: the cache is filled with random keys and values and its lengths are set,
because a prefill of 256K tokens would cost minutes and changes nothing about a step's time. Wall time counts the host too, and
waits for the GPU after every token, as generate() does. Implementations run one after another in one process. `--phase prefill`
times whole prompts instead (cells/step_prefill.py). A run that was interrupted goes on where it stopped: what the file already
holds for this commit, GPU, torch and transformers is skipped.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
import transformers
from transformers import CompileConfig

import zigzag_ext as zz
from zigzag_ext.hf.cache_argument import cache_argument
from zigzag_ext.study.weights import FORMATS

from .cells import step_prefill
from .cells.arguments import check_names, model_parser, names, token_counts
from .cells.fake_context import MARGIN, fake_dynamic, fake_static, fake_zigzag
from .cells.models import MODELS, PLANS, K, build_model, make_plan
from .cells.quantised_weights import build_quantised
from .peers.duo_recreation import duo_weights, fake_duo
from .report import comparisons
from .report.records import StepRecord, held, writer
from .timing import machine
from .timing.model_memory import kv_bytes, peak_bytes, weight_bytes
from .timing.profile_gpu import profiled, wait

WARMUP, STEPS, PROFILED = 3, 30, 3
LEAST_STEPS, SECONDS = 8, 1.0  # of slow steps fewer are timed: as many as fit in this time
PHASES = {"decode": ("step", "generate"), "prefill": ("prefill",)}


class Decoder:
    """Steps of one model with one cache, as generate() makes them."""

    def __init__(self, model, cache, context: int, call, margin: int = MARGIN):
        self.model, self.cache, self.call, self.held = model, cache, call, context
        self.ids = torch.randint(0, model.config.vocab_size, (1, context + margin), device=model.device)
        self.mask = torch.ones_like(self.ids)

    def step(self) -> None:
        self.held += 1
        ids, mask = self.ids[:, : self.held], self.mask[:, : self.held]
        positions = torch.full((1, 1), self.held - 1, device=ids.device)
        options = {"position_ids": positions, "use_cache": True, "logits_to_keep": 1}
        options |= cache_argument(self.model, self.cache)
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=1, attention_mask=mask, **options)
        logits = self.call(**inputs, return_dict=True).logits
        self.ids[:, self.held] = logits[:, -1].float().argmax(-1)
        wait(self.model)

    def generate(self, new_tokens: int) -> float:
        """Seconds that generate() takes to continue what the cache holds."""
        ids, mask = self.ids[:, : self.held + 1], self.mask[:, : self.held + 1]
        start = time.perf_counter()
        options = cache_argument(self.model, self.cache) | {"do_sample": False, "eos_token_id": None}
        out = self.model.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **options)
        self.ids[:, : out.shape[1]] = out  # what the cache holds, and the last token, which it does not
        wait(self.model)
        self.held += new_tokens
        return time.perf_counter() - start


def time_steps(decoder: Decoder) -> float:
    """Milliseconds of wall per step."""
    times = []
    for _ in range(WARMUP):
        decoder.step()
    while len(times) < min(LEAST_STEPS, STEPS) or (len(times) < STEPS and sum(times) < SECONDS):
        start = time.perf_counter()
        decoder.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def time_generate(decoder: Decoder, step_ms: float) -> float:
    """Milliseconds of wall per token; what a call costs whatever its length drops out of the difference of two."""
    tokens = max(min(LEAST_STEPS, STEPS), min(STEPS, int(SECONDS / (step_ms * 1e-3))))
    few, many, differences, start = 4, 4 + tokens, [], time.perf_counter()
    decoder.generate(few)
    while len(differences) < 3 and (not differences or time.perf_counter() - start < SECONDS):
        differences.append(decoder.generate(many) - decoder.generate(few))
    return statistics.median(differences) / tokens * 1e3


def busy(decoder: Decoder) -> tuple[float, float]:
    """Milliseconds of kernels, and launches, per step on a GPU."""
    on_gpu = decoder.model.device.type == "cuda"
    gpu_ms, launches = profiled(lambda: [decoder.step() for _ in range(PROFILED)], on_gpu) if on_gpu else (0.0, 0.0)
    return gpu_ms / PROFILED, launches / PROFILED


def measure(prepare: Callable[[], Decoder]) -> Iterator[dict]:
    decoder = prepare()
    if decoder.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wall_ms = time_steps(decoder)
    cache, model = decoder.cache, decoder.model
    common = {"kv_bytes": kv_bytes(cache), "peak_bytes": peak_bytes(model, cache), "weight_bytes": weight_bytes(model)}
    gpu_ms, launches = busy(decoder)
    common |= {"gpu_ms": gpu_ms, "launches": launches}
    yield {"phase": "step", "wall_ms": wall_ms, **common}
    yield {"phase": "generate", "wall_ms": time_generate(decoder, wall_ms), **common}


IMPLS = ("zigzag_eager", "zigzag_compiled", "transformers_eager", "transformers_compiled", "duo_recreation")


def cells(impl: str, model, plans: list[str], contexts: list[int]) -> Iterator[tuple[str, int, Callable]]:
    """Plan, context and a measurement for every cell of one implementation, which is on while they are drawn."""
    if impl == "duo_recreation":
        served = [name for name in plans if name != "retrieval_100"]
        for name in [] if any(zz.native_windows(model.config)) else served:  # it knows no windows of layers
            plan = make_plan(name, model.config)
            with duo_weights(model, plan):
                for context in contexts:
                    duo = partial(fake_duo, model, plan, context, MARGIN)
                    yield name, context, partial(measure, lambda n=context, duo=duo: Decoder(model, duo(), n, model))
        return
    if not impl.startswith("zigzag"):
        compiled = impl == "transformers_compiled"
        call = model.get_compiled_call(CompileConfig()) if compiled else model
        fake = fake_static if compiled else fake_dynamic
        for context in contexts:
            torch.compiler.reset()  # or the second context is compiled for shapes of any size, which is slower
            yield "full", context, partial(measure, lambda n=context: Decoder(model, fake(model, n), n, call))
        return
    with zz.zigzag(model, make_plan("retrieval_100", model.config), compile=impl == "zigzag_compiled"):
        for name in plans:
            plan = make_plan(name, model.config)
            for context in contexts:
                fake = partial(fake_zigzag, model, plan, context)
                yield name, context, partial(measure, lambda n=context, fake=fake: Decoder(model, fake(), n, model))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = model_parser(__doc__, "step")
    parser.add_argument("--phase", choices=PHASES, default="decode", help="decode steps (the default) or whole prompts")
    parser.add_argument(
        "--quick", action="store_true", help="decode: 4K and 128K tokens, half of the layers streaming: a minute or two"
    )
    parser.add_argument(
        "--context", type=token_counts, help="tokens, separated by commas; default 4K, 32K, 128K, 256K; prompts 128K, 320K"
    )
    parser.add_argument("--plan", type=names, help=f"of {', '.join(PLANS)}; default all; prompts {', '.join(step_prefill.PLANS)}")
    parser.add_argument("--impl", type=names, help=f"of {', '.join(IMPLS)}; default all; prompts zigzag_eager")
    parser.add_argument("--weights", choices=FORMATS, help="of linear layers (needs torchao); rows name the model MODEL-int4")
    parser.add_argument("--chunk", type=int, default=step_prefill.CHUNK, help="tokens of a prompt that are computed at once")
    args = parser.parse_args(argv)
    prompts = args.phase == "prefill"
    contexts, plans = ([4 * K, 128 * K], ["exclusive_50"]) if args.quick else ([4 * K, 32 * K, 128 * K, 256 * K], list(PLANS))
    args.context = args.context or list(step_prefill.CONTEXTS if prompts else contexts)
    args.plan = args.plan or (step_prefill.PLANS if prompts else plans)
    args.impl = args.impl or (["zigzag_eager"] if prompts else IMPLS)
    for given, known in ((args.plan, PLANS), (args.impl, step_prefill.IMPLS if prompts else IMPLS)):
        check_names(parser, given, known)
    return args


def build(name: str, weights: str | None, device: str):
    return build_quantised(MODELS[name], weights, device) if weights else build_model(name, device)


def all_cells(args: argparse.Namespace, model) -> Iterator[tuple[str, str, int, Callable]]:
    """Implementation, plan, context and a measurement for every cell."""
    for impl in args.impl:
        if args.phase == "prefill":
            drawn = step_prefill.cells(impl, model, args.plan, args.context, args.chunk)
        else:
            drawn = cells(impl, model, args.plan, args.context)
        for cell in drawn:
            yield impl, *cell


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    origin = {"commit": args.commit, "gpu": machine.processor(args.device), "driver": machine.driver(args.device)}
    origin |= {"torch": torch.__version__, "transformers": transformers.__version__}
    origin |= {"model": f"{args.model}-{args.weights}" if args.weights else args.model}
    kept, failed = held(args.csv, StepRecord, origin), []
    done = {(row.impl, row.plan, row.context, row.phase) for row in kept}
    model = build(args.model, args.weights, args.device)
    with torch.no_grad(), writer(args.csv, StepRecord, go_on=True) as add:
        for impl, plan, context, rows in all_cells(args, model):
            name, start = f"{impl:22} {plan:14} {context:7}", time.perf_counter()
            if all((impl, plan, context, phase) in done for phase in PHASES[args.phase]):
                print(f"{name} in {args.csv} already", flush=True)
                continue
            try:
                for row in rows():
                    if (impl, plan, context, row["phase"]) in done:
                        continue
                    kept.append(StepRecord(**origin, plan=plan, impl=impl, context=context, **row))
                    add(kept[-1])
                    times = f"{row['wall_ms']:8.2f} ms wall {row['gpu_ms']:8.2f} ms GPU {row['launches']:7.1f} launches"
                    print(f"{name} {row['phase']:9} {times}, after {time.perf_counter() - start:.1f} s", flush=True)
            except (torch.OutOfMemoryError, MemoryError) as error:
                print(f"{name} out of memory: {str(error).splitlines()[0]}", flush=True)
                failed.append(impl)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print("\n".join(comparisons.of_prompts(kept)))
    return 1 if any(impl.startswith("zigzag") for impl in failed) else 0


if __name__ == "__main__":
    sys.exit(main())
