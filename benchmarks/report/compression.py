"""The tables and the figure "What compressed prompts cost" of docs/evidence.md from the results of compression.py."""

import json
import math
import sys
from pathlib import Path

from zigzag_ext.cache.compression import METHODS
from zigzag_ext.study import plots
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
DRAWN = ("passkey", "multikey", "second_question")
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
    alone = "per_head=True" in options and name == "windows"
    return [f"{float(budget):.0%}", f"{name}, by each head" if alone else name]


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


def draw(rows: list[Row], path: Path) -> None:
    """Exact answers over the share that is kept, of the plan that streams: one panel per task of DRAWN."""
    plt = plots.pyplot()
    with plt.rc_context(plots.STYLE):
        figure, axes = plt.subplots(1, len(DRAWN), figsize=(9.2, 4.4), layout="constrained", sharey=True)
        for axis, task in zip(axes, DRAWN, strict=True):
            own = sorted((row for row in rows if (row.plan, row.task) == ("half", task)), key=lambda row: order(row.compress))
            lines: dict[str, list] = {}
            for row in own:
                share = float(row.compress.split()[1]) if row.compress else 1.0
                lines.setdefault(label(row.compress)[1], []).append((share, row.exact, row.exact_low, row.exact_high))
            plots.draw_lines(axis, lines, "exact")
            axis.set_title(TASKS[task])
        one = rows[0]
        words = f"{one.model}, {PLANS['half']}, prompts of {one.length} tokens, {one.prompts} a point, 95% intervals"
        figure.suptitle(words, fontsize=11, x=0.01, ha="left")
        axes[len(DRAWN) // 2].set_xlabel("tokens of a prompt that retrieval layers keep, %")
        axes[0].set_ylabel(plots.LABEL["exact"])
        plots.legend_below(figure, *axes[0].get_legend_handles_labels())
        plots.save(figure, path)


def write(folder: Path, target: Path) -> int:
    """Puts the tables between the markers of `target`, and the figure into figures/ beside it."""
    results = folder / "compression.csv"
    if not results.exists():
        print(f"no results at {results}: run benchmarks.compression first", file=sys.stderr)
        return 1
    runs = [json.loads(line) for line in (folder / "compression_runs.jsonl").read_text().splitlines()]
    rows = read(results)
    if not insert(target, NAME, text(rows, runs)):
        print(f"{target} has no {' ... '.join(markers(NAME))}", file=sys.stderr)
        return 1
    path = target.parent / "figures" / "compression.png"
    path.parent.mkdir(exist_ok=True)
    draw(rows, path)
    print(f"{target}, {path}: updated")
    return 0
