"""The table "What quantised caches cost" of docs/evidence.md from the results of kv_quality.py."""

import math
import sys
from pathlib import Path

from .documents import insert, markers, table
from .records import QualityRecord, read

ORDER = ("none", "fp8", "int8", "int8/int4", "int4", "int4, zero point")
NAME = "kv_quality"
HEADER = ["layers", "keys/values", "key smoothing", "perplexity", "keys found", "key's log-probability"]


def table_row(rows: list[QualityRecord]) -> list[str]:
    """One line of the table: the results of both tasks for one format."""
    row, found = rows[0], {row.task: row for row in rows}
    kv_format = f"{row.kv_format} (emulated)" if row.impl == "emulated" else row.kv_format
    cells = [row.plan, kv_format, "yes" if row.key_smoothing else "", *["–"] * 3]
    if text := found.get("perplexity"):
        cells[3] = f"{math.exp(-text.logprob):.3f}"
    if key := found.get("passkey"):
        cells[4] = f"{100 * key.exact:.0f} [{100 * key.exact_low:.0f}, {100 * key.exact_high:.0f}]"
        cells[5] = f"{key.logprob:.3f} ± {key.logprob_high - key.logprob:.3f}"
    return cells


def text(rows: list[QualityRecord]) -> str:
    """One table per machine and dtype."""
    rows = sorted(rows, key=lambda row: (row.plan != "full", ORDER.index(row.kv_format), row.key_smoothing))
    parts = []
    for origin in dict.fromkeys(row.origin for row in rows):
        own = [row for row in rows if row.origin == origin]
        first, commits = own[0], ", ".join(dict.fromkeys(row.commit for row in own))
        sizes = "; ".join(dict.fromkeys(f"{row.task}: {row.samples} samples of {row.tokens} tokens" for row in own))
        parts.append(f"**{first.machine}, {first.dtype}**, torch {first.torch}, commit {commits}. {sizes}")
        lines = {line: [row for row in own if row.line == line] for line in dict.fromkeys(row.line for row in own)}
        parts.append(table(HEADER, [table_row(line) for line in lines.values()], text_columns=3))
    return "\n\n".join(parts)


def write(results: Path, target: Path) -> int:
    """Puts the tables between the markers of `target`."""
    if not results.exists():
        print(f"no results at {results}: run benchmarks.kv_quality first", file=sys.stderr)
        return 1
    if not insert(target, NAME, text(read(results, QualityRecord))):
        print(f"{target} has no {' ... '.join(markers(NAME))}", file=sys.stderr)
        return 1
    print(f"{target}: updated")
    return 0
