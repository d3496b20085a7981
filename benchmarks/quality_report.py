"""The table "What quantised caches cost" of docs/evidence.md from the results of kv_quality.py."""

import sys
from pathlib import Path

from records import QualityRecord, read_as

ORDER = ("none", "fp8", "int8", "int8/int4", "int4", "int4, zero point")
BEGIN, END = "<!-- results:kv_quality -->", "<!-- /results:kv_quality -->"
HEADER = ("layers", "keys/values", "key smoothing", "perplexity", "keys found", "key's log-probability")


def table_row(row: QualityRecord) -> str:
    kv_format = f"{row.kv_format} (emulated)" if row.impl == "emulated" else row.kv_format
    found = f"{100 * row.exact:.0f} [{100 * row.exact_low:.0f}, {100 * row.exact_high:.0f}]"
    logprob = f"{row.logprob:.3f} ± {row.logprob_high - row.logprob:.3f}"
    smoothing = "yes" if row.key_smoothing else ""
    return "| " + " | ".join((row.plan, kv_format, smoothing, f"{row.perplexity:.3f}", found, logprob)) + " |"


def text(rows: list[QualityRecord]) -> str:
    """One table per machine, dtype and size."""
    rows = sorted(rows, key=lambda row: (row.plan != "full", ORDER.index(row.kv_format), row.key_smoothing))
    parts = []
    for origin in dict.fromkeys(row.origin for row in rows):
        own = [row for row in rows if row.origin == origin]
        first = own[0]
        commits = ", ".join(dict.fromkeys(row.commit for row in own))
        parts.append(
            f"**{first.machine}, {first.dtype}**, torch {first.torch}, commit {commits}: {first.passages} passages and "
            f"{first.prompts} passkey prompts of {first.tokens} tokens"
        )
        rule = "| --- | --- | --- | ---: | ---: | ---: |"
        parts.append("\n".join(["| " + " | ".join(HEADER) + " |", rule, *map(table_row, own)]))
    return "\n\n".join(parts)


def write(results: Path, target: Path) -> int:
    """Puts the tables between the markers of `target`."""
    if not results.exists():
        print(f"no results at {results}: run benchmarks/kv_quality.py first", file=sys.stderr)
        return 1
    before, begin, rest = target.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        print(f"{target} has no {BEGIN} ... {END}", file=sys.stderr)
        return 1
    target.write_text(f"{before}{BEGIN}\n{text(read_as(results, QualityRecord))}\n{END}{after}")
    print(f"{target}: updated")
    return 0
