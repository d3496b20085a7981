"""Times many requests at once:  python -m benchmarks.serve --csv serve.csv

The model has random weights, so have the prompts, which are really read. Scenarios:
    steady    steps in which all rows decode (of one row: also model.generate(), compiled on a GPU)
    whole     rows that all come at once, from the first prompt to the last token
    stall     rows that decode while a long prompt is read, and a short prompt beside both
    capacity  "steady" of as many rows as fit
    prefix    prompts that begin as an earlier one
    server    clients over HTTP, of `zigzag serve` and of `transformers serve --continuous-batching`; with --model tiny
A run that was interrupted goes on where it stopped: scenarios that the file holds for this commit and machine are skipped.
"""

import argparse
import gc
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
import transformers

import zigzag_ext as zz

from .cells.arguments import check_names, counts, model_parser, names, token_count
from .cells.models import PLANS, K, build_model, make_plan
from .cells.problem import Unsupported
from .cells.serve_scenarios import CHUNK, LONG, SCENARIOS, Job, filled, steps_of_prompts
from .peers import generate_batch, servers
from .report.records import ServeRecord, held, writer
from .timing import machine

IMPLS = {  # by scenario
    **dict.fromkeys(SCENARIOS, ("engine",)),
    "steady": ("engine", "generate"),
    "whole": ("engine", "generate_batch"),
    "server": tuple(servers.COMMANDS),
}
PEERS = ("generate_batch", "transformers_server")  # know no plans
SIZES = {"cuda": Job(16, 32 * K, 256), "cpu": Job(4, 512, 32)}
MANY_ROWS = 512  # more than fit, in the scenario "capacity"


def on_engine(scenario: str, model, plan: zz.Plan, job: Job, memory: float) -> Iterator[tuple[str, dict]]:
    """The rows of one scenario, of an engine of its own."""
    if scenario == "capacity":
        job = most_rows(model, plan, job, memory)
    with made(scenario, model, plan, job, memory) as engine:
        yield from SCENARIOS[scenario](engine, job)


def made(scenario: str, model, plan: zz.Plan, job: Job, memory: float) -> zz.Engine:
    if scenario in ("steady", "capacity"):
        options = {"max_rows": job.rows, "max_len": job.prompt + filled(job), "prefill_chunk": CHUNK}
    else:
        longest = (LONG + 1) * job.prompt + job.new + steps_of_prompts(job.rows + 2 * LONG, job.prompt) + 1024
        options = {"max_rows": job.rows + 2, "max_len": longest}
    return zz.Engine(model, plan, memory=memory, **options)


def most_rows(model, plan: zz.Plan, job: Job, memory: float) -> Job:
    """As many rows as an engine that is made for so many has memory for, rings of all of them included."""

    def fits(rows: int) -> bool:
        try:
            with made("capacity", model, plan, replace(job, rows=rows), memory) as engine:
                return engine.capacity(job.prompt, filled(replace(job, rows=rows))) == rows
        except ValueError:  # not even the rings
            return False

    least, most = 0, MANY_ROWS
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    if not least:
        raise MemoryError(f"no request of {job.prompt} tokens fits")
    return replace(job, rows=least)


def measure(scenario: str, impl: str, model, plan: zz.Plan, job: Job, memory: float) -> Iterator[tuple[str, dict]]:
    if impl == "engine":
        return on_engine(scenario, model, plan, job, memory)
    if scenario == "server":
        return servers.measure(impl, model, plan if impl == "zigzag_server" else None, job)
    return getattr(generate_batch, impl)(model, plan, job)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = model_parser(__doc__, "serve")
    parser.add_argument(
        "--scenario", type=names, default=["steady", "whole"], help=f"of {', '.join(IMPLS)}; default steady,whole"
    )
    parser.add_argument("--plan", type=names, default=["retrieval_100", "exclusive_50"], help=f"of {', '.join(PLANS)}")
    parser.add_argument(
        "--impl", type=names, help="engine, generate, generate_batch, and the servers; default all that a scenario has"
    )
    parser.add_argument("--kv-format", default="none", help="of retrieval layers and rings; default none")
    parser.add_argument("--rows", type=counts, help="requests at once, separated by commas; default 16, on a CPU 4")
    parser.add_argument("--prompt", type=token_count, help="tokens of each prompt; default 32K, on a CPU 512")
    parser.add_argument("--new", type=int, help="tokens that each request decodes; default 256, on a CPU 32")
    parser.add_argument("--memory", type=float, default=0.9, help="for keys and values, of what is free")
    args = parser.parse_args(argv)
    usual = SIZES[args.device]
    args.rows = args.rows or [usual.rows]
    args.prompt, args.new = args.prompt or usual.prompt, args.new or usual.new
    for given, known in ((args.scenario, IMPLS), (args.plan, PLANS), (args.impl or [], sum(IMPLS.values(), ()))):
        check_names(parser, given, known)
    return args


def cells(args: argparse.Namespace) -> Iterator[tuple[str, str, str, Job]]:
    """Scenario, plan, implementation and sizes of all that is to be measured."""
    for scenario in args.scenario:
        for rows in args.rows:
            for impl in [impl for impl in IMPLS[scenario] if args.impl is None or impl in args.impl]:
                for plan in ["full"] if impl in PEERS else args.plan:
                    if impl != "generate" or rows == 1:
                        yield scenario, plan, impl, Job(rows, args.prompt, args.new)


def cell_of(scenario: str, plan: str, impl: str, sizes: Job | ServeRecord) -> tuple:
    """What is measured once. How many rows the capacity is, is seen then."""
    return scenario, plan, impl, sizes.prompt, None if scenario == "capacity" else sizes.rows


def show(row: ServeRecord) -> str:
    return (
        f"{row.scenario:24} {row.plan:14} {row.impl:19} {row.rows:3} x {row.prompt:6}: {row.wall_s:8.2f} s, "
        f"{row.tokens_per_s:8.1f} tokens/s, first {row.first_p50_s:7.3f} / {row.first_p99_s:7.3f} s, "
        f"between {row.between_p50_ms:7.2f} / {row.between_p99_ms:7.2f} ms (p50 / p99), "
        f"{row.kv_bytes / 1e9:.2f} GB, {row.cached_tokens} tokens not read"
    )


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    origin = {"commit": args.commit, "gpu": machine.processor(args.device), "driver": machine.driver(args.device)}
    origin |= {"torch": torch.__version__, "transformers": transformers.__version__, "model": args.model}
    origin |= {"kv_format": args.kv_format}
    done = {cell_of(row.scenario.partition(":")[0], row.plan, row.impl, row) for row in held(args.csv, ServeRecord, origin)}
    model, failed = build_model(args.model, args.device), False
    with writer(args.csv, ServeRecord, go_on=True) as add:
        for scenario, name, impl, job in cells(args):
            if cell_of(scenario, name, impl, job) in done:
                print(f"{scenario} {name} {impl} {job.rows} is in {args.csv} already", flush=True)
                continue
            plan = make_plan("retrieval_100" if name == "full" else name, model.config)
            if args.kv_format != "none":
                plan = plan.with_formats(args.kv_format, args.kv_format, None)
            empty = {"rows": job.rows, "prompt": job.prompt, "kv_bytes": 0, "cached_tokens": 0}
            try:
                for label, fields in list(measure(scenario, impl, model, plan, job, args.memory)):  # all of it, or nothing
                    row = ServeRecord(**origin, scenario=label, plan=name, impl=impl, **empty | fields)
                    add(row)
                    print(show(row), flush=True)
            except (torch.OutOfMemoryError, MemoryError) as error:
                print(f"{scenario} {name} {impl}: out of memory: {str(error).splitlines()[0]}", flush=True)
                failed = failed or impl == "engine"
            except Exception as error:  # a peer's failure must not end the run
                if impl not in PEERS:
                    raise
                kind = "unsupported" if isinstance(error, Unsupported) else f"failed: {type(error).__name__}"
                print(f"{scenario} {name} {impl}: {kind}: {error}", flush=True)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
