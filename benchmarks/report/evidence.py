"""Tables and figures of docs/evidence.md from the results of evidence.py: plans at half of the layers, and over the budget."""

import csv
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from zigzag_ext.study import plots
from zigzag_ext.study.evaluate import RULER, Row, read
from zigzag_ext.study.evaluate.results import wilson

from ..cells.evidence_plans import canonical
from .documents import insert, markers, table

NAME = "evidence"
REFERENCES = (("", "full"), ("", "streaming"), ("", "demo"))
NONE = "–"


class Results:
    """Rows by plan, task and length; plans by name."""

    def __init__(self, folder: Path):
        self.rows: dict[tuple, Row] = {}
        for row in read(folder / "rows.csv"):
            self.rows[canonical(row.kinds), row.task, row.length] = row
        with (folder / "plans.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        self.names = [(line["source"], line["rule"], float(line["ratio"])) for line in lines]
        self.kinds = {name: canonical(line["kinds"]) for name, line in zip(self.names, lines, strict=True)}
        cells = {(task, length) for _, task, length in self.rows}
        self.cells = sorted((c for c in cells if c[0] in _ORDER), key=lambda cell: (_ORDER[cell[0]], cell[1]))
        self.ruler_cells = sorted(cell for cell in cells if cell[0] in RULER)
        self.ratios = sorted({ratio for *pair, ratio in self.names if tuple(pair) not in REFERENCES})
        runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
        self.run, self.commits = runs[-1], list(dict.fromkeys(run["commit"] for run in runs))

    def of(self, name: tuple, task: str, length: int | None = None) -> list[Row]:
        """Rows of a plan: one, or one per length."""
        kinds = self.kinds.get(name)
        return [row for (k, t, n), row in self.rows.items() if (k, t) == (kinds, task) and length in (None, n)]


_ORDER = {"passkey": 0, "multikey": 1, "multivalue": 2, "perplexity": 3}


def exact(rows: Sequence[Row]) -> str:
    """Percent of exact matches over all prompts, with the Wilson interval."""
    if not rows:
        return NONE
    trials = sum(row.prompts for row in rows)
    hits = sum(round(row.exact * row.prompts) for row in rows)
    low, high = wilson(hits, trials)
    return f"{100 * hits / trials:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def logprob(rows: Sequence[Row]) -> str:
    """Mean log-probability per token over all prompts, with the half width of its 95% interval."""
    if not rows:
        return NONE
    trials = sum(row.prompts for row in rows)
    mean = sum(row.logprob * row.prompts for row in rows) / trials
    half = math.sqrt(sum(((row.logprob_high - row.logprob) * row.prompts) ** 2 for row in rows)) / trials
    return f"{mean:.3f} ± {half:.3f}"


def perplexity(rows: Sequence[Row]) -> str:
    return f"{math.exp(-fmean(row.logprob for row in rows)):.2f}" if rows else NONE


def title(source: str, rule: str) -> str:
    if rule == "heads":
        return f"{source}, per head"
    return f"{source}, {rule}" if source else {"streaming": "all streaming", "demo": "the demo's plan"}.get(rule, rule)


def detail_table(results: Results, ratio: float) -> str:
    """Every plan that streams `ratio` of the layers, in every cell. Random plans are pooled."""
    columns = [f"{task} {length}" for task, length in results.cells]
    lines = []

    def add(label: str, names: Iterable[tuple]) -> None:
        found = {cell: [row for name in names for row in results.of(name, *cell)] for cell in results.cells}
        shown = [perplexity(found[cell]) if cell[0] == "perplexity" else exact(found[cell]) for cell in results.cells]
        if any(found.values()):
            key = [row for cell, rows in found.items() if cell[0] == "passkey" for row in rows]
            lines.append([label, *shown, logprob(key)])

    at_ratio = [name for name in results.names if name[2] == ratio]
    random = [name for name in at_ratio if name[1] == "random"]
    for name in [n for n in results.names if n[:2] in REFERENCES] + [n for n in at_ratio if n not in random]:
        add(title(*name[:2]), [name])
    add(f"random, {len(random)} plans", random)
    return table(["plan", *columns, "key's log-probability"], lines)


def budget_table(results: Results, task: str, show) -> str:
    """One line per source at objective mean, per head, and without scores; one column per share of streaming layers."""
    ratios = results.ratios
    pairs = list(dict.fromkeys((source, rule) for source, rule, _ in results.names if rule in ("mean", "heads", "even")))
    full, streaming = (next(n for n in results.names if n[:2] == pair) for pair in REFERENCES[:2])
    ends = [show(results.of(full, task)), show(results.of(streaming, task))]
    lines = [[title(*pair), ends[0], *(show(results.of((*pair, ratio), task)) for ratio in ratios), ends[1]] for pair in pairs]
    random = {
        ratio: [row for name in results.names if name[1:] == ("random", ratio) for row in results.of(name, task)]
        for ratio in ratios
    }
    lines.append(["random", ends[0], *(show(random[ratio]) for ratio in ratios), ends[1]])
    return table(["streaming", "0%", *(f"{ratio:.0%}" for ratio in ratios), "100%"], lines)


def ruler_table(results: Results) -> str:
    """Mean score in percent of every plan that RULER's tasks were put to."""
    lines = []
    for kinds in dict.fromkeys(results.kinds.values()):
        found = [results.rows.get((kinds, *cell)) for cell in results.ruler_cells]
        if any(found):
            percents = [[round(100 * x) for x in (row.exact, row.exact_low, row.exact_high)] if row else None for row in found]
            source, rule, _ = next(name for name, value in results.kinds.items() if value == kinds)
            lines.append([title(source, rule), *(f"{cell[0]} [{cell[1]}, {cell[2]}]" if cell else NONE for cell in percents)])
    return table(["plan", *(f"{task} {length}" for task, length in results.ruler_cells)], lines)


def text(results: Results) -> str:
    run = results.run
    parts = [f"**{run['model']}, {run['dtype']}, {run['gpu']}**, torch {run['torch']}, commit {', '.join(results.commits)}"]
    for ratio in sorted(results.ratios, key=lambda ratio: abs(ratio - 0.5))[:1]:
        parts += [
            f"### All plans at {ratio:.0%} streaming layers",
            "Exact matches in percent with 95% intervals; perplexity; the passkey's log-probability per token, over all lengths.",
            detail_table(results, ratio),
        ]
    parts += [
        "### Passkey over the budget: exact matches in percent, all lengths", budget_table(results, "passkey", exact),
        "### Passkey over the budget: log-probability per token, all lengths", budget_table(results, "passkey", logprob),
        "### Multi-key over the budget: log-probability per token, 4096 tokens", budget_table(results, "multikey", logprob),
        "### Multi-value over the budget: log-probability per token, 4096 tokens", budget_table(results, "multivalue", logprob),
        "### Perplexity over the budget", budget_table(results, "perplexity", perplexity),
    ]  # fmt: skip
    if results.ruler_cells:
        parts += ["### RULER at 50% streaming layers: mean score in percent", ruler_table(results)]
    return "\n\n".join(parts)


def draw(results: Results, folder: Path) -> list[Path]:
    """Passkey over the budget: layers chosen by mean score per method, evenly spaced, random, and full attention."""
    written = []
    for quantity in ("exact", "logprob"):
        lines: dict[str, dict[float, list[Row]]] = {}
        for source, rule, ratio in results.names:
            if rule in ("full", "even", "random", "mean"):
                label = {"full": "full attention", "mean": source}.get(rule, rule)
                lines.setdefault(label, {}).setdefault(ratio, []).extend(results.of((source, rule, ratio), "passkey"))
        points = {
            label: [(1.0 - ratio, *plots.mean_interval(rows, quantity)) for ratio, rows in sorted(shares.items()) if rows]
            for label, shares in lines.items()
        }
        words = "passkey", plots.conditions([row for shares in lines.values() for rows in shares.values() for row in rows])
        path = folder / f"evidence_{quantity}.png"
        written.append(plots.curves({label: line for label, line in points.items() if line}, quantity, path, words))
    return written


def write(folder: Path, target: Path) -> int:
    """Puts the tables between the markers of `target`, and the figures into figures/ beside it."""
    if not (folder / "rows.csv").exists():
        print(f"no results in {folder}: run benchmarks.evidence first", file=sys.stderr)
        return 1
    results, figures = Results(folder), target.parent / "figures"
    if not insert(target, NAME, text(results)):
        print(f"{target} has no {' ... '.join(markers(NAME))}", file=sys.stderr)
        return 1
    figures.mkdir(exist_ok=True)
    for path in (target, *draw(results, figures)):
        print(f"{path}: updated")
    return 0
