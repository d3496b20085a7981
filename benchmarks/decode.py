"""Times decode attention against its peers, in one process on one machine:  python -m benchmarks.decode --csv decode.csv

Every output is checked against zigzag_ext.reference (float64) before it is timed. Caches are cold (rotated buffers), a GPU
replays CUDA graphs, implementations take turns, and medians are reported with their 20th and 80th percentiles.
zigzag's time includes the append of the new token; the peers attend a cache that already holds it.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch

from .cells.problem import TOLERANCE, Problem, Unsupported
from .cells.scenarios import BY_DEVICE, Cell
from .peers import attention as peers
from .report.records import Record, writer
from .timing import clock, machine


def prepare_all(problem: Problem, modules: dict) -> tuple[dict, dict[str, float], dict[str, str]]:
    """Clocks and errors of the peers whose output is right, and for the others the reason why they are not timed."""
    clocks, errors, reasons = {}, {}, {}
    for name, module in modules.items():
        try:
            if problem.cell.quantised:
                kv_format = problem.cell.kv_format
                problem.need(kv_format in getattr(module, "KV_FORMATS", ()), f"no {kv_format} caches")
            run = module.prepare(problem)
            errors[name] = problem.error(run(0))
            if not errors[name] <= TOLERANCE[problem.cell.kv_format]:
                reasons[name] = f"wrong: relative error {errors[name]:.1e}, allowed {TOLERANCE[problem.cell.kv_format]:.0e}"
                continue
            clocks[name] = clock.make_clock(problem.device, run, problem.num_sets, problem.cell.kv_bytes)
        except ImportError as error:
            reasons[name] = f"missing: {error}"
        except Unsupported as error:
            reasons[name] = f"unsupported: {error}"
        except Exception as error:  # a peer's failure must not end the run
            reasons[name] = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return clocks, errors, reasons


def record(cell: Cell, impl: str, time: clock.Quantiles, copy_gbps: float, origin: dict[str, str]) -> Record:
    gbps = cell.kv_bytes / time.p50 * 1e-3
    return Record(
        **origin,
        op=cell.op,
        impl=impl,
        scenario=cell.scenario,
        kv_format=cell.kv_format,
        batch=cell.batch,
        num_q_heads=cell.num_q_heads,
        num_kv_heads=cell.num_kv_heads,
        head_dim=cell.head_dim,
        q_len=cell.q_len,
        kv_len=cell.slots,
        sink=cell.sink,
        window=cell.window,
        p20_us=time.p20,
        p50_us=time.p50,
        p80_us=time.p80,
        bytes=cell.kv_bytes,
        gbps=gbps,
        pct_copy=100 * gbps / copy_gbps,
    )


def run_cell(cell: Cell, device: str, modules: dict, origin: dict[str, str], copy_gbps: float, add) -> dict[str, str]:
    """Checks, times, prints and writes (add(record)) one cell. Returns the peers that were not timed, with the reason."""
    problem = Problem(cell, device)
    clocks, errors, reasons = prepare_all(problem, modules)
    times = clock.measure(device, clocks)
    print(f"{cell.scenario}: {cell.kv_bytes / 1e6:.1f} MB, {problem.num_sets} sets of buffers")
    for impl, time in sorted(times.items(), key=lambda item: item[1].p50):
        row = record(cell, impl, time, copy_gbps, origin)
        add(row)
        rates = f"{row.gbps:8.1f} GB/s {row.pct_copy:6.1f}% of copy"
        spread = f"[{row.p20_us:.2f}, {row.p80_us:.2f}]"
        print(f"  {impl:18} {row.p50_us:10.2f} us {spread:24} {rates}  error {errors[impl]:.1e}")
    for impl, reason in reasons.items():
        print(f"  {impl:18} {reason}")
    sys.stdout.flush()
    return reasons


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(BY_DEVICE), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the two-minute subset")
    parser.add_argument("--scenario", help="names from cells/scenarios.py, separated by commas; default: all of the device")
    parser.add_argument("--peer", help="names of files in peers/attention/, separated by commas; default: all")
    parser.add_argument("--csv", type=Path, help="file for the results, written anew")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument(
        "--commit", default=machine.commit(), help="name of the measured source; default from ZIGZAG_COMMIT or git"
    )
    return parser.parse_args(argv)


def pick(kind: str, wanted: str | None, known: dict) -> dict:
    """The named items of `known`. Exits with the known names if one is not among them."""
    names = wanted.split(",") if wanted else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"unknown {kind} {', '.join(unknown)}; known: {', '.join(known)}")
    return {name: known[name] for name in names}


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    cells = pick("scenario", args.scenario, {cell.scenario: cell for cell in BY_DEVICE[args.device]})
    modules = pick("peer", args.peer, peers.for_device(args.device))
    gpu, driver = machine.processor(args.device), machine.driver(args.device)
    origin = {"commit": args.commit, "gpu": gpu, "driver": driver, "torch": torch.__version__}
    copy_gbps = clock.copy_bandwidth(args.device)
    print(f"{gpu}, driver {driver}, torch {torch.__version__}: copy {copy_gbps:.1f} GB/s (read + write)")
    not_timed: dict[str, dict[str, str]] = {}
    with torch.inference_mode(), writer(args.csv) as add:
        for cell in cells.values():
            if args.quick and not cell.quick:
                continue
            not_timed[cell.scenario] = run_cell(cell, args.device, modules, origin, copy_gbps, add)
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    ours_failed = [scenario for scenario, reasons in not_timed.items() if "zigzag" in reasons]
    missing = sorted({name for reasons in not_timed.values() for name, why in reasons.items() if why.startswith("missing")})
    if missing:
        print(f"not installed here, not measured: {', '.join(missing)}")
    if ours_failed:
        print(f"zigzag failed in: {', '.join(ours_failed)}", file=sys.stderr)
    return 1 if ours_failed else 0


if __name__ == "__main__":
    sys.exit(main())
