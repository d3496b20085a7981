"""Results to tables and figures:  python -m benchmarks.report

Reads benchmarks/results/*.csv, puts tables between the results markers (decode, layers, step, prefill, capacity, speculate,
compressed) of documents, and draws docs/figures/*.png. benchmarks/results/README.md shows every row, README.md and
docs/performance.md a few.
Speed-ups compare rows of one file only, because one file is one run.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from ..cells.scenarios import BY_DEVICE
from . import compressed, figures, lead, rounds, steps
from .documents import insert, markers, table
from .records import CapacityRecord, CompressedRecord, PrefillRecord, Record, SpeculateRecord, StepRecord, read

ROOT = Path(__file__).resolve().parents[2]
KINDS = {  # files that begin so; all others: Record
    "step": StepRecord, "prefill": PrefillRecord, "capacity": CapacityRecord, "speculate": SpeculateRecord,
    "compressed": CompressedRecord,
}  # fmt: skip
QUICK = {cell.scenario for cells in BY_DEVICE.values() for cell in cells if cell.quick}
TEN = {  # what docs/performance.md shows of a GPU: one token at three lengths, and one cell of every other kind
    "decode_1x4k", "decode_1x32k", "decode_1x128k", "decode_8x32k", "ragged_64k_31x4k", "mha_1x4k", "verify8_1x32k",
    "decode_1x128k_fp8", "ring_64+256", "ring_64+256_b64",
}  # fmt: skip
# Documents and which rows of decode they show. None: every row of every kind, and every implementation.
DOCUMENTS: dict[str, Callable[[Record], bool] | None] = {
    "README.md": lambda row: row.scenario in QUICK,
    "docs/performance.md": lambda row: row.scenario in TEN and row.driver != "-",
    "docs/speculation.md": lambda row: False,
    "benchmarks/results/README.md": None,
}
Cells = dict[tuple, dict[str, Record]]  # shape -> impl -> row


def by_cell(rows: Iterable[Record]) -> Cells:
    cells: Cells = {}
    for row in rows:
        cells.setdefault(row.shape, {})[row.impl] = row
    return cells


def best_peer(impls: dict[str, Record]) -> Record | None:
    return min((row for name, row in impls.items() if name not in ("zigzag", "read")), key=lambda row: row.p50_us, default=None)


def microseconds(row: Record | None) -> str:
    if row is None:
        return "–"
    return f"{row.p50_us:,.2f}" if row.p50_us < 100 else f"{row.p50_us:,.1f}" if row.p50_us < 1000 else f"{row.p50_us:,.0f}"


def cell_name(row: Record) -> str:
    keys = f"ring {row.sink}+{row.window}" if row.window else f"{row.kv_len:,} keys"
    keys = f"{row.batch} x {keys}"
    if row.ragged:
        keys = f"{row.batch} rows of up to {row.kv_len:,} keys"
    queries = f", {row.q_len} new tokens" if row.q_len > 1 else ""
    rope = ", RoPE included" if row.scenario.endswith("_rope") else ""
    return f"{keys}, {row.num_q_heads}/{row.num_kv_heads} heads, d{row.head_dim}, {row.kv_format}{queries}{rope}"


def summary_table(cells: Cells) -> str:
    """Ours against the best peer of the same run, or against a pure read of the same bytes where no peer ran."""
    ours = {shape: impls for shape, impls in cells.items() if "zigzag" in impls}
    has_peers = any(best_peer(impls) for impls in ours.values())
    header = (
        ["cell", "zigzag, us", "best peer, us", "speed-up"] if has_peers else ["cell", "zigzag, us", "pure read, us", "of read"]
    )
    lines = []
    for impls in ours.values():
        mine = impls["zigzag"]
        other = best_peer(impls) if has_peers else impls.get("read")
        ratio = other.p50_us / mine.p50_us if other else None
        shown = f"{microseconds(other)} ({other.impl})" if other and has_peers else microseconds(other)
        compared = "–" if ratio is None else f"{ratio:.2f}x" if has_peers else f"{100 * ratio:.0f}%"
        lines.append([cell_name(mine), microseconds(mine), shown, compared, f"{mine.gbps:,.0f}", f"{mine.pct_copy:.0f}%"])
    return table([*header, "GB/s", "of copy"], lines)


def full_table(cells: Cells) -> str:
    """Every implementation's median in every cell."""
    impls = sorted({name for cell in cells.values() for name in cell}, key=lambda name: (name != "zigzag", name == "read", name))
    lines = [[cell_name(next(iter(cell.values()))), *(microseconds(cell.get(name)) for name in impls)] for cell in cells.values()]
    return table(["median, us", *impls], lines)


def origin(rows: list, file: str, link: str) -> str:
    row, commits = rows[0], ", ".join(dict.fromkeys(row.commit for row in rows))
    parts = [row.gpu]
    parts += [f"driver {row.driver}"] if row.driver != "-" else []
    parts += [f"torch {row.torch}"] if row.torch != "-" else []
    return f"**{', '.join(parts)}**, commit {commits} ([{file}]({link}))"


def sections(sources: dict[Path, list[Record]], target: Path, shows: Callable[[Record], bool] | None) -> str:
    """The tables of decode in `target`. The short form shows runs with peers only."""
    parts = []
    for path, rows in sources.items():
        cells = by_cell(row for row in rows if shows is None or shows(row))
        has_peers = any(best_peer(impls) for impls in cells.values())
        if shows is None or has_peers:
            link = Path(os.path.relpath(path, target.parent)).as_posix()
            parts += [origin(rows, path.name, link), summary_table(cells)]
        if shows is None and has_peers:
            parts.append(full_table(cells))
    return "\n\n".join(parts)


def model_sections(kind: str, sources: dict[Path, list], target: Path, complete: bool) -> str:
    """What files of other kinds than decode say. The short form of steps is one model of `step.csv`, at one context."""
    parts = []
    for path, rows in sources.items():
        if kind == "step" and not complete and path.stem != kind:
            continue
        link = Path(os.path.relpath(path, target.parent)).as_posix()
        title = origin(rows, path.name, link)
        if kind == "prefill":
            parts += [title, steps.prefill_table(rows)]
        elif kind == "capacity":
            parts += [title, steps.capacity_table(rows)]
        elif kind == "speculate":
            parts += [title, rounds.table_of(rows)]
        elif kind == "compressed":
            parts += [title, compressed.table_of(rows)]
        elif kind == "layers":
            parts += [title, steps.layers_table(rows)]
        else:
            parts += [title, steps.step_table(rows if complete else steps.highlights(rows))]
            if any(row.phase == "prefill" for row in rows):
                parts.append(steps.prompt_table(rows))
    return "\n\n".join(parts)


def read_all(results: Path) -> dict[str, dict[Path, list]]:
    """The rows of every file in a folder, by kind of result."""
    found: dict[str, dict[Path, list]] = {kind: {} for kind in ("decode", "layers", *KINDS)}
    for path in sorted(results.glob("*.csv")):
        kind = next((kind for kind in KINDS if path.name.startswith(kind)), "decode")
        if path.name.startswith("kv_quality"):  # quality.py has those
            continue
        rows = read(path, KINDS.get(kind, Record))
        if kind == "decode":  # bench_layers writes chains of layers, which have no peers, in the columns of decode
            parts = {"decode": [r for r in rows if r.op.startswith("decode_")], "layers": [r for r in rows if r.op == "step"]}
        else:
            parts = {kind: rows}
        for part, its_rows in parts.items():
            if its_rows:
                found[part][path] = its_rows
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of CSV files")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    args = parser.parse_args(argv)
    found = read_all(args.results)
    if not any(found.values()):
        print(f"no results in {args.results}: run benchmarks.decode or bench_decode first", file=sys.stderr)
        return 1
    for name, shows in DOCUMENTS.items():
        target = args.root / name
        for kind, sources in found.items():
            if not sources:
                continue
            is_decode = kind == "decode"
            text = sections(sources, target, shows) if is_decode else model_sections(kind, sources, target, shows is None)
            done = insert(target, kind, text)
            print(f"{target}: {kind} updated" if done else f"{target}: {kind} skipped, no {markers(kind)[0]} in it")
    folder = args.root / "docs" / "figures"
    drawn = figures.draw_all(found["decode"], folder)
    for path, rows in found["step"].items():
        drawn += steps.draw_steps(rows, folder, path.stem)
        if path.stem == "step":
            longest = [row for rows in found["capacity"].values() for row in rows]
            drawn += lead.draw(rows, longest, args.results / "evidence", folder)
    for path in drawn:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
