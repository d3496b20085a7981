"""Times prompt chunks against their peers:  python -m benchmarks.prefill --csv benchmarks/results/prefill.csv

Every output is checked before it is timed (sampled rows in float64). Implementations take turns, in a new order every round: a
GPU at its power limit runs slower behind a kernel that drew more. Medians are reported with their 20th and 80th percentiles.
zigzag and route_* include the append of the new tokens, peers attend keys already in place. A run that was interrupted goes on
where it stopped: scenarios that the file already holds for this commit, GPU and torch are skipped.
"""

import argparse
import gc
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .cells.prefill_cells import BY_DEVICE, FULL, PrefillCell, PrefillProblem, prepare
from .cells.problem import Unsupported
from .report import comparisons, records
from .report.records import PrefillRecord
from .timing import clock, machine

MOST_ROUNDS, LEAST_ROUNDS, SECONDS = 15, 3, 4.0  # samples per implementation; time for one scenario
CALLS, CALLS_SECONDS = 20, 2e-3  # a sample of short calls holds as many as fit in this time, at most CALLS
HOLD_CYCLES = 4_000_000  # about 2 ms on an H100: the host enqueues all calls of a sample meanwhile
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 1e-4}


def sampler(run: Callable[[], object], device: str) -> Callable[[], float]:
    """sample() -> microseconds per call. On a GPU, between events, with the queue held until the host has enqueued everything."""
    start = time.perf_counter()
    run()
    if device == "cpu":

        def sample_cpu():
            begin = time.perf_counter()
            run()
            return (time.perf_counter() - begin) * 1e6

        return sample_cpu
    torch.cuda.synchronize()
    calls = max(1, min(CALLS, int(CALLS_SECONDS / (time.perf_counter() - start))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def sample():
        torch.cuda._sleep(HOLD_CYCLES)
        events[0].record()
        for _ in range(calls):
            run()
        events[1].record()
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) * 1e3 / calls

    return sample


def prepare_all(problem: PrefillProblem) -> tuple[dict, dict[str, str]]:
    """Samplers of the implementations whose output is right, and for the others the reason why they are not timed."""
    samplers, reasons = {}, {}
    for impl in problem.cell.impls:
        try:
            begin = time.perf_counter()
            run = prepare(impl, problem)
            error = problem.error(run(), impl)
            seconds = time.perf_counter() - begin
            if not error <= TOLERANCE[problem.cell.dtype]:
                reasons[impl] = f"wrong: relative error {error:.1e}, allowed {TOLERANCE[problem.cell.dtype]:.0e}"
                continue
            samplers[impl] = sampler(run, problem.device)
            print(f"  {impl:16} error {error:.1e}, first call and check {seconds:.2f} s")
        except ImportError as error:
            reasons[impl] = f"missing: {error}"
        except Unsupported as error:
            reasons[impl] = f"unsupported: {error}"
        except Exception as error:  # a peer's failure must not end the run
            reasons[impl] = f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    return samplers, reasons


def measure(samplers: dict[str, Callable[[], float]]) -> dict[str, clock.Quantiles]:
    samples: dict[str, list[float]] = {impl: [] for impl in samplers}
    begin, order, rng = time.perf_counter(), list(samplers), random.Random(0)
    for rounds in range(MOST_ROUNDS):
        if rounds >= LEAST_ROUNDS and time.perf_counter() - begin > SECONDS:
            break
        rng.shuffle(order)
        for impl in order:
            samples[impl].append(samplers[impl]())
    return {impl: clock.quantiles(sample) for impl, sample in samples.items()}


def run_cell(cell: PrefillCell, device: str, origin: dict[str, str]) -> tuple[list[PrefillRecord], dict[str, str]]:
    """Checks, times and prints one scenario. Returns its rows, and the implementations not timed with the reason."""
    print(f"{cell.scenario}: {cell.tokens} tokens on {cell.past}, sink {cell.sink}, window {cell.window}")
    problem = PrefillProblem(cell, device)
    samplers, reasons = prepare_all(problem)
    rows = []
    for impl, quantiles in sorted(measure(samplers).items(), key=lambda item: item[1].p50):
        full = impl.startswith(FULL)
        shape = {name: getattr(cell, name) for name in ("scenario", "batch", "num_q_heads", "num_kv_heads", "head_dim")}
        shape |= {
            "tokens": cell.tokens,
            "past": cell.past,
            "sink": 0 if full else cell.sink,
            "window": 0 if full else cell.window,
        }
        times = {"p20_us": quantiles.p20, "p50_us": quantiles.p50, "p80_us": quantiles.p80}
        flops = cell.flops(impl)
        rows.append(PrefillRecord(**origin, **shape, **times, impl=impl, flops=flops, tflops=flops / quantiles.p50 * 1e-6))
        spread = f"[{quantiles.p20:.1f}, {quantiles.p80:.1f}]"
        print(f"  {impl:16} {quantiles.p50:12.1f} us {spread:26} {rows[-1].tflops:8.2f} TFLOP/s")
    for impl, reason in reasons.items():
        print(f"  {impl:16} {reason}")
    sys.stdout.flush()
    return rows, reasons


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(BY_DEVICE), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scenario", help="names or beginnings of names, separated by commas; default: all of the device")
    parser.add_argument("--csv", type=Path, help="file for the results; rows are added to it")
    parser.add_argument(
        "--commit", default=machine.commit(), help="name of the measured source; default from ZIGZAG_COMMIT or git"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    wanted = tuple(args.scenario.split(",")) if args.scenario else ("",)
    cells = [cell for cell in BY_DEVICE[args.device] if cell.scenario.startswith(wanted)]
    if not cells:
        sys.exit(f"unknown scenario {args.scenario}; known: {', '.join(cell.scenario for cell in BY_DEVICE[args.device])}")
    origin = {"commit": args.commit, "gpu": machine.processor(args.device), "driver": machine.driver(args.device)}
    origin["torch"] = torch.__version__
    kept = records.held(args.csv, PrefillRecord, origin)
    done, failed = {row.scenario for row in kept}, []
    with torch.inference_mode():
        for cell in cells:
            if cell.scenario in done:
                print(f"{cell.scenario}: in {args.csv} already")
                continue
            rows, reasons = run_cell(cell, args.device, origin)
            kept += rows
            failed += [cell.scenario] if "zigzag" in reasons else []
            with records.writer(args.csv, PrefillRecord, go_on=True) as add:
                for row in rows:
                    add(row)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print("\n".join(comparisons.of_chunks(kept)))
    if failed:
        print(f"zigzag failed in: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
