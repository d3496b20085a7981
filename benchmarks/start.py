"""Times how long the first compiled tokens take:  python -m benchmarks.start --csv start.csv

From the call of generate() with a short prompt, weights loaded and the prompt's kernels warm, to the first decoded token, by
enable(compile=True): for one row, and then for two in the same process. In a process with an empty compiler cache, and in
another one with what that has left. Weights are random.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch
import transformers

import zigzag_ext as zz

from .cells.arguments import model_parser
from .cells.models import PLANS, build_model, make_plan
from .report.records import StartRecord, writer
from .timing import machine
from .timing.profile_gpu import wait

PROMPT = 16  # tokens
CACHES = ("empty", "warm")


def time_starts(name: str, device: str, plan: str) -> list[tuple[int, float]]:
    """Rows and seconds: of the first generate() call over so many."""
    model = build_model(name, device)
    chosen, starts = make_plan(plan, model.config), []
    with zz.zigzag(model, chosen):
        _generate(model, 1, 2)  # libraries and the kernels of prompts, which nothing compiles
    with zz.zigzag(model, chosen, compile=True):
        for batch in (1, 2):
            start = time.perf_counter()
            _generate(model, batch, 2)
            starts.append((batch, time.perf_counter() - start))
    return starts


def _generate(model, batch: int, new_tokens: int) -> None:
    ids = torch.randint(0, model.config.vocab_size, (batch, PROMPT), device=model.device)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, eos_token_id=None)
    wait(model)


def measure(args: argparse.Namespace) -> list[tuple[str, int, float]]:
    """State of the compiler cache, rows, seconds; each state in a process of its own, as neither may know the other's graphs."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        places = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
        for cache in CACHES:
            command = [sys.executable, "-m", "benchmarks.start", "--device", args.device, "--model", args.model]
            done = subprocess.run(
                [*command, "--plan", args.plan, "--here"], env=os.environ | places, stdout=subprocess.PIPE, text=True, check=True
            )
            found = [line.split() for line in done.stdout.splitlines() if line.startswith("start ")]
            rows += [(cache, int(batch), float(seconds)) for _, batch, seconds in found]
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = model_parser(__doc__, "start")
    parser.add_argument("--plan", choices=PLANS, default="exclusive_50")
    parser.add_argument("--here", action="store_true", help="in this process, with the compiler cache as it is; to stdout")
    args = parser.parse_args(argv)
    if args.here:
        for batch, seconds in time_starts(args.model, args.device, args.plan):
            print(f"start {batch} {seconds:.3f}", flush=True)
        return 0
    origin = {"commit": args.commit, "gpu": machine.processor(args.device), "driver": machine.driver(args.device)}
    origin |= {"torch": torch.__version__, "transformers": transformers.__version__, "model": args.model, "plan": args.plan}
    with writer(args.csv, StartRecord, go_on=True) as add:
        for cache, batch, seconds in measure(args):
            add(StartRecord(**origin, cache=cache, batch=batch, seconds=seconds))
            print(f"{args.model} {args.plan}, {cache:5} compiler cache, {batch} rows: {seconds:6.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
