"""The tables "What compressed prompts cost" of docs/evidence.md from the results of compression.py."""

import json
import math
import sys
from pathlib import Path

from zigzag_ext.cache.compression import METHODS
from zigzag_ext.study.evaluate import Row, read

from .documents import insert, markers, table

NAME = "compression"
TASKS = {
    "passkey": "passkey",
    "multikey": "multi-key",
    "multivalue": "multi-value",
    "second_question": "second question",
    "quotation": "quotation's perplexity",
}
PLANS = {"half": "half of the layers stream", "full": "full attention"}


def cell(row: Row | None) -> str:
    """Percent of exact answers with its interval, and log-probability per token; of quotations the perplexity."""
    if row is None:
        return "–"
    if row.task == "quotation":
        low, high = (math.exp(-value) for value in (row.logprob_high, row.logprob_low))
        return f"{math.exp(-row.logprob):.2f} [{low:.2f}, {high:.2f}]"
    return f"{100 * row.exact:.0f} [{100 * row.exact_low:.0f}, {100 * row.exact_high:.0f}], {row.logprob:.2f}"


def label(compress: str) -> list[str]:
    """The share kept, and the method with what is not the same for all."""
    if not compress:
        return ["100%", "nothing dropped"]
    name, budget, *options = compress.split()
    same = "per_head=False" in options and name == "windows"
    return [f"{float(budget):.0%}", f"{name}, the same for all heads" if same else name]


def order(compress: str) -> tuple:
    """Nothing dropped first, then by share and method."""
    name, budget, *_ = compress.split() or ("", "2")
    return -float(budget), [*METHODS, ""].index(name), compress


def text(rows: list[Row], runs: list[dict]) -> str:
    """One table per plan, length and number of prompts."""
    last, commits = runs[-1], ", ".join(dict.fromkeys(run["commit"] for run in runs))
    parts = [f"**{last['machine']}, {last['dtype']}**, torch {last['torch']}, commit {commits}"]
    for plan, length, prompts in dict.fromkeys((row.plan, row.length, row.prompts) for row in rows):
        own = [row for row in rows if (row.plan, row.length, row.prompts) == (plan, length, prompts)]
        found = {(row.compress, row.task): row for row in own}
        lines = []
        for compress in sorted({row.compress for row in own}, key=order):
            lines.append([*label(compress), *(cell(found.get((compress, task))) for task in TASKS)])
        parts.append(f"{PLANS.get(plan, plan)}, {length} tokens, {prompts} prompts a cell:")
        parts.append(table(["kept", "method", *TASKS.values()], lines, text_columns=2))
    return "\n\n".join(parts)


def write(folder: Path, target: Path) -> int:
    """Puts the tables between the markers of `target`."""
    results = folder / "compression.csv"
    if not results.exists():
        print(f"no results at {results}: run benchmarks.compression first", file=sys.stderr)
        return 1
    runs = [json.loads(line) for line in (folder / "compression_runs.jsonl").read_text().splitlines()]
    if not insert(target, NAME, text(read(results), runs)):
        print(f"{target} has no {' ... '.join(markers(NAME))}", file=sys.stderr)
        return 1
    print(f"{target}: updated")
    return 0
