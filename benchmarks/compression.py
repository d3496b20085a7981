"""What compressed prompts cost in quality, on the demo model:

    python -m benchmarks.compression                         # 52 prompts a cell of 4096 tokens: minutes on a GPU, a day on a CPU
    python -m benchmarks.compression --tokens 1024 --prompts 3   # 12 prompts a cell: some 20 minutes of a CPU core
    python -m benchmarks.compression --budget-seconds 300    # stops cleanly; the same command goes on later
    python -m benchmarks.compression --report                # the table of docs/evidence.md from the results

Every method of compressing prompts, at equal budgets, with the plan of half of the layers that the copying scores choose, and
with full attention. A prompt is read once for all methods. All keep the first 4 tokens and let the last 16 decide, so that only
the choice of tokens differs. Rows are added to compression.csv in --results and never measured twice. No network is used.
"""

import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path

import torch
import transformers

import zigzag_ext as zz
from zigzag_ext.cache.compression import METHODS, PromptCompression
from zigzag_ext.cli import demo
from zigzag_ext.study import evaluate
from zigzag_ext.study.evaluate.results import statistics
from zigzag_ext.study.evaluate.task import describe, describe_plan

from .timing import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "evidence"
DEPTHS = (0.1, 0.35, 0.6, 0.85)
TASKS = ("passkey", "multikey", "multivalue", "second_question", "quotation")
SINK, OBSERVE, SEED = 4, 16, 0
WHOLE = zz.PromptWindows(budget=1.0, sink=SINK, observe=OBSERVE)  # changes no bit: the same prompt serves what is not compressed


def methods_of(budgets: list[float]) -> list[PromptCompression]:
    """`WHOLE`, then every method at every budget; windows also with heads that choose alone."""
    kinds = [*((name, {}) for name in METHODS), ("windows", {"per_head": True})]
    same = {"sink": SINK, "observe": OBSERVE}
    return [WHOLE, *(METHODS[name](budget=b, **same, **options) for b, (name, options) in product(budgets, kinds))]


def plans_of(results: Path, layers: int) -> dict[str, zz.Plan]:
    sizes = {"sink": 64, "window": 256}
    scores = zz.load_scores(results / "head_scores" / "retrieval.tsv")
    return {"half": zz.solve(scores, 0.5, "mean", **sizes), "full": zz.Plan(["retrieval"] * layers, **sizes)}


def measure(model, tokenizer, task: evaluate.Task, name: str, plan: zz.Plan, methods: list, args) -> list[evaluate.Row]:
    """A row per method, over all depths."""
    samples = task.samples(tokenizer, args.tokens, DEPTHS, args.prompts, SEED)
    rows = []
    for method, verdicts in zip(methods, evaluate.score_each(model, samples, plan, methods, args.batch_tokens), strict=True):
        what = describe_plan(plan, name, model, None if method is WHOLE else method)
        cell = {"task": task.name, "length": args.tokens, "depth": None, "seed": SEED}
        rows.append(evaluate.Row(**describe(model), **what, **cell, **statistics(verdicts)))
    return rows


def note_run(path: Path, model) -> None:
    device = model.device.type
    note = {
        **describe(model),
        "commit": machine.commit(),
        "machine": machine.processor(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    with path.open("a") as file:
        file.write(json.dumps(note) + "\n")


def run(args: argparse.Namespace) -> None:
    start, path = time.monotonic(), args.results / "compression.csv"
    transformers.logging.set_verbosity_error()
    model, tokenizer = demo.load(args.device, args.dtype)
    note_run(args.results / "compression_runs.jsonl", model)
    done = {row.cell for row in evaluate.read(path)} if path.exists() else set()
    methods, plans = methods_of(args.budgets), plans_of(args.results, model.config.num_hidden_layers)
    for (name, plan), task in product(plans.items(), args.tasks):
        if args.budget_seconds is not None and time.monotonic() - start > args.budget_seconds:
            print("stopped; the same command goes on from here")
            return
        what = describe_plan(plan, name, model)
        fixed = (*describe(model).values(), task, *(what[key] for key in ("kinds", "sink", "window")))
        cell = (args.tokens, None, SEED, args.prompts * len(DEPTHS))
        missing = [m for m in methods if (*fixed, "" if m is WHOLE else str(m), *cell) not in done]
        if missing:
            rows = measure(model, tokenizer, evaluate.TASKS[task], name, plan, missing, args)
            evaluate.append(path, rows)
            print(f"[{time.monotonic() - start:6.0f} s] {name}, {task}: {len(rows)} rows", flush=True)
    print(f"complete: {path}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="per prompt, answer included (default 4096)")
    parser.add_argument("--prompts", type=int, default=13, help=f"at each of {len(DEPTHS)} depths (default 13)")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.25, 0.12, 0.06], help="shares of a prompt that stay")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--batch-tokens", type=int, default=None, help="tokens per forward; default: the device's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--budget-seconds", type=float, default=None, help="stop cleanly after this time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only rewrite the table of docs/evidence.md")
    args = parser.parse_args(argv)
    if args.report:
        from .report import compression as report

        return report.write(args.results, ROOT / "docs" / "evidence.md")
    run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
