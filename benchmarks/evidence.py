"""Which layers may stream? Scores a real model by every method, makes plans from the scores, and evaluates all of them:

    python -m benchmarks.evidence                        # SmolLM2-135M-Instruct, everything: minutes on a GPU, a day on a CPU
    python -m benchmarks.evidence --quick                # one method, one length: an hour on two CPU cores
    python -m benchmarks.evidence --budget-seconds 300   # stops cleanly; the same command goes on later
    python -m benchmarks.evidence --ruler 50             # also RULER's tasks, 50 prompts a cell; needs zigzag_ext[ruler]
    python -m benchmarks.evidence --report               # tables and figures of docs/evidence.md from the results

Results are appended to rows.csv in --results and never measured twice; head_scores/ there keeps the scores, with what they were
made from (scores of an older version of the prompts are replaced), plans.csv says which plan is which, runs.jsonl on what machine
and commit. Every plan runs on the zigzag kernels. No network is used.
"""

import argparse
import csv
import json
import sys
import time
import traceback
from pathlib import Path

import torch
import transformers

import zigzag_ext as zz
from zigzag_ext.cli import demo
from zigzag_ext.study import evaluate
from zigzag_ext.study.evaluate.task import describe
from zigzag_ext.study.identify.data import VERSION
from zigzag_ext.study.loading import load_model

from .cells.evidence_plans import RATIOS, Named, all_plans, demo_plan, distinct, in_ruler
from .timing import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "evidence"
SINK, WINDOW, SEED = 64, 256, 0
RULER_TASKS, RULER_LENGTHS = ("niah_single_1", "niah_multikey_2", "ruler_vt"), (1024, 2048, 4096)
DEPTHS = tuple(round(0.05 + 0.1 * i, 2) for i in range(10))

# Method, its options, and how much it reads on a GPU; on a CPU its defaults apply.
METHODS = {
    "lazy": ("lazy", {}, {"tokens": 4096, "prompts": 32}),
    "retrieval": ("retrieval", {}, {"tokens": 4096, "prompts": 32}),
    "ablation": ("ablation", {}, {"tokens": 2048, "prompts": 16}),
    "ablation_heads": ("ablation", {"level": "head"}, {"tokens": 2048, "prompts": 16}),
    "greedy": ("greedy", {}, {"tokens": 2048, "prompts": 16, "exhaustive": True}),
    "gates": ("gates", {}, {"tokens": 2048, "prompts": 400}),
    "gates_layers": ("gates", {"level": "layer"}, {"tokens": 2048, "prompts": 400}),
}


class OutOfTime(Exception):
    """The time budget is spent; everything measured so far is saved."""


class Clock:
    def __init__(self, budget: float | None):
        self.start, self.budget = time.monotonic(), budget

    def check(self, *_) -> None:
        if self.budget is not None and self.seconds > self.budget:
            raise OutOfTime

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def head_scores(model, tokenizer, methods: list[str], folder: Path, sizes: dict, clock: Clock) -> dict:
    """Scores by method: read from `folder`, or found now and kept there. Those made from other prompts (`data.VERSION`) are made
    anew. A method that fails is reported and left out."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "origins.json"
    origins = json.loads(note.read_text()) if note.exists() else {}
    scores = {}
    for name in methods:
        path, (method, options, on_gpu) = folder / f"{name}.tsv", METHODS[name]
        if not path.exists() or origins.get(name, {}).get("data") != VERSION:
            reads = sizes or (on_gpu if model.device.type == "cuda" else {})
            options = {"seed": SEED, "sink": SINK, "window": WINDOW, **options, **reads}
            begin = clock.seconds
            path.unlink(missing_ok=True)
            try:
                zz.identify(model, tokenizer, method, output=path, advance=clock.check, **options)
            except OutOfTime:
                raise
            except Exception:  # whatever it is, the other methods have their scores all the same
                traceback.print_exc()
                print(f"[{clock.seconds:6.0f} s] no scores by {name}: it failed", flush=True)
                continue
            origins[name] = {"data": VERSION, **options, **describe(model)}
            note.write_text(json.dumps(origins, indent=1) + "\n")
            print(f"[{clock.seconds:6.0f} s] scores by {name}: {clock.seconds - begin:.0f} s", flush=True)
        scores[name] = zz.load_scores(path)
    return scores


def tasks_of(lengths: list[int], prompts: int) -> list[tuple[evaluate.Task, int, dict]]:
    """(task, length, options): passkey at every length, the dearer tasks at one or two."""
    spread = {"depths": DEPTHS, "prompts": -(-prompts // len(DEPTHS))}
    middle = sorted(lengths)[len(lengths) // 2]
    grid = [(evaluate.passkey, length, spread) for length in lengths]
    grid += [(evaluate.multikey, middle, spread), (evaluate.multivalue, middle, spread)]
    return [*grid, (evaluate.perplexity, middle, {"prompts": max(prompts // 2, 1)})]


def measure(model, tokenizer, named: Named, grid, done: set, path: Path, clock: Clock) -> bool:
    """Appends what is missing of one plan's rows. Returns whether anything was."""
    before = clock.seconds
    rows = []
    for task, length, options in grid:
        prompts = options["prompts"] * (len(options["depths"]) if task.has_depth else 1)
        sizes = (named.plan.sink, named.plan.window)
        cell = (*describe(model).values(), task.name, named.kinds, *sizes, "", length, None, SEED, prompts)
        if cell in done:
            continue
        clock.check()
        rows += task(model, tokenizer, named.plan, lengths=[length], seed=SEED, name=named.name, pooled=True, **options)
        evaluate.append(path, rows[-1:])
        done.add(cell)
    if rows:
        found = ", ".join(f"{row.exact:.0%} of {row.task} {row.length}" for row in rows if row.task != "perplexity")
        print(f"[{clock.seconds:6.0f} s] {named.name}: {clock.seconds - before:.1f} s; {found}", flush=True)
    return bool(rows)


def write_plans(path: Path, named: list[Named]) -> None:
    with path.open("w", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["source", "rule", "ratio", "kinds"])
        lines.writerows([each.source, each.rule, each.ratio, each.kinds] for each in named)


def note_run(path: Path, model, args: argparse.Namespace) -> None:
    device = model.device.type
    note = {
        **describe(model),
        "commit": machine.commit(),
        "gpu": machine.processor(device),
        "driver": machine.driver(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        **{name: getattr(args, name) for name in ("methods", "lengths", "prompts")},
    }
    with path.open("a") as file:
        file.write(json.dumps(note) + "\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="model folder; default: the demo's SmolLM2-135M-Instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS), help="shares of streaming layers, in this order")
    parser.add_argument(
        "--plans", nargs="+", default=[""], metavar="NAME", help="only plans whose names begin so: full retrieval-mean"
    )
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 7168])
    parser.add_argument("--prompts", type=int, default=50, help="per task and length, over 10 depths")
    parser.add_argument("--identify-tokens", type=int, help="length of the prompts that find scores (default: see METHODS)")
    parser.add_argument("--identify-prompts", type=int, help="how many, or training steps of gates (default: see METHODS)")
    parser.add_argument("--ruler", type=int, default=0, help="prompts per task and length of RULER; 0: none")
    parser.add_argument("--budget-seconds", type=float, default=None, help="stop cleanly after this time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="retrieval scores, half of the layers, 1024 tokens, 10 prompts")
    parser.add_argument("--report", action="store_true", help="only rewrite the tables and figures of docs/evidence.md")
    args = parser.parse_args(argv)
    if args.quick:
        args.methods, args.ratios, args.lengths, args.prompts = ["retrieval"], [0.5], [1024], 10
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.report:
        from .report import evidence as evidence_report  # needs matplotlib

        return evidence_report.write(args.results, ROOT / "docs" / "evidence.md")
    clock = Clock(args.budget_seconds)
    transformers.logging.set_verbosity_error()
    model, tokenizer = load_model(args.model or str(demo.model_folder()), args.device, args.dtype)
    args.results.mkdir(parents=True, exist_ok=True)
    note_run(args.results / "runs.jsonl", model, args)
    layers, kv_heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    asked = {"tokens": args.identify_tokens, "prompts": args.identify_prompts}
    sizes = {name: value for name, value in asked.items() if value is not None}
    path = args.results / "rows.csv"
    try:
        scores = head_scores(model, tokenizer, args.methods, args.results / "head_scores", sizes, clock)
        named = list(all_plans(scores, layers, kv_heads, args.ratios, SINK, WINDOW))
        if args.model is None:
            named.insert(2, demo_plan())
        write_plans(args.results / "plans.csv", named)
        named = [each for each in named if each.name.startswith(tuple(args.plans))]
        plans, grid = distinct(named), tasks_of(args.lengths, args.prompts)
        done = {row.cell for row in evaluate.read(path)} if path.exists() else set()
        print(f"[{clock.seconds:6.0f} s] {len(named)} plans, {len(plans)} of them distinct; {len(grid)} cells each", flush=True)
        for each in plans:
            measure(model, tokenizer, each, grid, done, path, clock)
        ruler = [(evaluate.RULER[name], length, {"prompts": args.ruler}) for name in RULER_TASKS for length in RULER_LENGTHS]
        for each in distinct([each for each in named if args.ruler and in_ruler(each)]):
            measure(model, tokenizer, each, ruler, done, path, clock)
    except OutOfTime:
        print(f"stopped after {clock.seconds:.0f} s; the same command goes on from here")
        return 0
    missing = [name for name in args.methods if name not in scores]
    print(f"[{clock.seconds:6.0f} s] complete{f' without {missing}' if missing else ''}: {path}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
