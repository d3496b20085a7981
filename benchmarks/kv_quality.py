"""What quantised caches cost in quality, on the demo model:

    python -m benchmarks.kv_quality             # measures what benchmarks/results/kv_quality.csv lacks; delete it to start anew
    python -m benchmarks.kv_quality --report    # the table of docs/evidence.md from that file

Perplexity of passages of Python's language reference (their last 512 tokens) and the passkey task, for every KV format, with and
without key smoothing, with full attention and with the demo's good plan. Formats run in the kernels. int4 with a zero point,
which the kernels do not have, is emulated: keys and values are quantised and widened again in float32, and attended by torch. The
same emulation of int4 as it is gives what the kernels give (tests/benchmarks/test_kv_quality.py).
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from zigzag_ext import Plan
from zigzag_ext.attention import reference, smoothing
from zigzag_ext.cli import demo
from zigzag_ext.study.evaluate import passkey, perplexity
from zigzag_ext.study.evaluate.results import statistics
from zigzag_ext.study.evaluate.scoring import score
from zigzag_ext.study.probe import probe
from zigzag_ext.study.torch_attention import banded, causal

from .report import quality as quality_report
from .report.records import QualityRecord, read, writer
from .timing import machine

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("none", "int4", "int8/int4", "fp8", "int8")
DEPTHS = (0.0, 0.1, 0.2, 0.3, 0.4)  # the windows of streaming layers do not reach back to these
SCORED = ("exact", "exact_low", "exact_high", "logprob", "logprob_low", "logprob_high")
Variant = tuple[str, bool, Callable[[Tensor], Tensor] | None]  # format, key smoothing, and the codec of an emulation


def symmetric_int4(x: Tensor) -> Tensor:
    """What the kernels' codes of x [..., head_dim] stand for."""
    return reference.decode(*reference.encode(x, torch.uint8)).to(x)


def zero_point_int4(x: Tensor) -> Tensor:
    """x [..., head_dim] in 16 steps from the least to the largest element of a vector, as KIVI has it (arXiv 2402.02750)."""
    low, high = x.float().amin(-1, keepdim=True), x.float().amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(torch.finfo(torch.float32).tiny)
    return (((x.float() - low) / step).round().clamp(0, 15) * step + low).to(x)


def less_mean(codec: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The codec after key smoothing, see `zigzag_ext.attention.smoothing`."""

    def smoothed(k: Tensor) -> Tensor:
        mean = k[:, :, : smoothing.TOKENS].float().mean(2, keepdim=True).to(k)
        return codec(k - mean) + mean

    return smoothed


@contextmanager
def emulated(model, plan: Plan, codec: Callable[[Tensor], Tensor], smooth: bool) -> Iterator[None]:
    """Retrieval layers attend keys and values that went through `codec`, streaming layers as they are."""
    key_codec = less_mean(codec) if smooth else codec

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if plan.kinds[layer] == "streaming":
            return banded(q, k, v, scale, plan.sink, plan.window)
        return causal(q, key_codec(k), codec(v), scale)

    with probe(model, attend):
        yield


def variants() -> Iterator[Variant]:
    """First what says most, as a run may be cut short."""
    for kv_format in FORMATS:
        for smooth in (False, True)[: 1 if kv_format == "none" else 2]:
            yield kv_format, smooth, None
            if kv_format == "int4":
                yield "int4, zero point", smooth, zero_point_int4


def measure(model, plan: Plan, variant: Variant, samples: list) -> dict:
    """The measured columns of a row."""
    kv_format, smooth, codec = variant
    if codec is None:
        chosen, attention = replace(plan, kv_format=kv_format, key_smoothing=smooth), nullcontext()
    else:
        chosen, attention = None, emulated(model, plan, codec, smooth)
    with attention:
        found = statistics(score(model, samples, chosen))
    return {name: found[name] for name in SCORED}


def cells(tasks: dict[str, list], plans: dict[str, Plan]) -> Iterator[tuple[dict, list, Plan, Variant]]:
    """Columns that say what is measured, and what it takes to."""
    for task, samples in tasks.items():
        for variant, (name, plan) in product(variants(), plans.items()):
            kv_format, smooth, codec = variant
            what = {"plan": name, "kv_format": kv_format, "key_smoothing": smooth, "task": task}
            what |= {"impl": "zigzag" if codec is None else "emulated"}
            what |= {"tokens": len(samples[0].ids), "samples": len(samples)}
            yield what, samples, plan, variant


def run(args: argparse.Namespace) -> None:
    model, tokenizer = demo.load(args.device, args.dtype)
    tasks = {
        "perplexity": perplexity.samples(tokenizer, args.tokens, [None], args.passages),
        "passkey": passkey.samples(tokenizer, args.tokens, DEPTHS, args.prompts),
    }
    everywhere = {
        "commit": args.commit or machine.commit(),
        "machine": machine.processor(model.device.type),
        "torch": torch.__version__,
        "model": demo.PACKAGE,
        "dtype": str(model.dtype)[6:],
    }
    done = {row.cell for row in read(args.csv, QualityRecord)} if args.csv.exists() else set()
    plans = {name.removesuffix(" plan"): plan for name, plan in demo.demo_plans().items() if name != "bad plan"}
    with writer(args.csv, QualityRecord, go_on=True) as add:
        for what, samples, plan, variant in cells(tasks, plans):
            blank = QualityRecord(**everywhere, **what, **dict.fromkeys(SCORED, 0.0))
            if blank.cell not in done:
                row = replace(blank, **measure(model, plan, variant, samples))
                add(row)
                print(row, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="per passage and per prompt (default 512)")
    parser.add_argument("--passages", type=int, default=2, help="passages of text (default 2)")
    parser.add_argument("--prompts", type=int, default=4, help=f"passkey prompts at each of {len(DEPTHS)} depths (default 4)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "kv_quality.csv")
    parser.add_argument("--commit", help="of the code, where git cannot say")
    parser.add_argument("--report", action="store_true", help="only rewrite the table of docs/evidence.md")
    args = parser.parse_args(argv)
    if args.report:
        return quality_report.write(args.csv, ROOT / "docs" / "evidence.md")
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
