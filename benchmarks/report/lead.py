"""The figure that the README begins with: time and memory of a token over the context, and what plans find, side by side."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt

from . import figures
from .evidence import Results
from .records import CapacityRecord, StepRecord
from .steps import GB, tokens

MODELS = {"llama3-8b": "Llama-3-8B's shape"}  # by the names that step.csv has
NAMES = {"smollm2-135m-instruct-0.1.2": "SmolLM2-135M-Instruct"}
LINE = {"linewidth": 1.5, "markersize": 6}
LONG = {"marker": "*", "markersize": 13, "markerfacecolor": "white", "markeredgewidth": 1.6, "linestyle": "none"}
SERIES = {  # (impl, plan) of step.csv, by what the figure calls it; colours told apart by colour-blind readers, see `figures`
    "full attention, transformers": ("transformers_compiled", "full", {"color": "#7F7F7F", "marker": "X", "linestyle": "--"}),
    "full attention, zigzag_ext": ("zigzag_compiled", "retrieval_100", {"color": "#0072B2", "marker": "s"}),
    "50% of layers retrieve": ("zigzag_compiled", "exclusive_50", {"color": figures.OURS, "marker": "o", "linewidth": 2.6}),
    "25% of layers retrieve": ("zigzag_compiled", "exclusive_25", {"color": "#009E73", "marker": "D"}),
}
QUALITY = {  # (source, rule, share that streams) of the evidence
    "full attention, zigzag_ext": ("", "full", 0.0),
    "50% of layers retrieve": ("retrieval", "mean", 0.5),
    "25% of layers retrieve": ("retrieval", "mean", 0.75),
    "50%, evenly spaced layers": ("", "even", 0.5),
}
EVEN = {"color": "#CC79A7", "marker": "v", "linestyle": ":"}


def draw(steps: list[StepRecord], capacity: list[CapacityRecord], evidence: Path, folder: Path) -> list[Path]:
    """Writes lead.png from rows of one model and GPU, if each of `SERIES` is there at two contexts or more; else nothing."""
    steps = sorted((r for r in steps if r.phase == "generate" and r.model in MODELS), key=lambda row: row.context)
    drawn = {name: [row for row in steps if (row.impl, row.plan) == key[:2]] for name, key in SERIES.items()}
    if min(map(len, drawn.values())) < 2 or not (evidence / "rows.csv").exists():
        return []
    capacity = [r for r in capacity if (r.impl, r.gpu, r.model) == ("zigzag_compiled", steps[0].gpu, steps[0].model)]
    results, target = Results(evidence), folder / "lead.png"
    with plt.rc_context(figures.STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(10.4, 4.6), layout="constrained")
        _over_contexts(axes[0], drawn, capacity, lambda row: getattr(row, "generate_ms", row.wall_ms))
        _over_contexts(axes[1], drawn, capacity, lambda row: row.kv_bytes / GB)
        _quality(axes[2], results)
        shape, gpu = f"{MODELS[steps[0].model]}, bf16, batch 1", steps[0].gpu.removesuffix(" HBM3")
        quality = f"{NAMES.get(results.run['model'], results.run['model'])}, {results.run['dtype'].replace('bfloat16', 'bf16')}"
        words = (f"tokens in the cache\n{shape},\n{gpu}", f"tokens in the cache\n{shape}", f"tokens of the prompt\n{quality}")
        for axis, title, text in zip(axes, ("ms per generated token", "KV cache, GB", "passkeys found, %"), words, strict=True):
            axis.set_title(title, fontsize=12, loc="left", fontweight="bold")
            axis.set_xlabel(text)
        handles = [dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True)) for axis in (axes[2], axes[0])]
        shown = handles[1] | {name: handle for name, handle in handles[0].items() if name not in SERIES}
        figure.legend(shown.values(), shown.keys(), fontsize=11, loc="outside lower center", ncols=3)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, bbox_inches="tight", facecolor="white", metadata={"Software": None})
        plt.close(figure)
    return [target]


def _over_contexts(axis, drawn: dict[str, list[StepRecord]], capacity: list[CapacityRecord], value: Callable) -> None:
    """`value` of each row over its context: lines of steps, and the longest contexts as stars in the colours of their plans."""
    for name, (_, plan, look) in SERIES.items():
        axis.plot([row.context for row in drawn[name]], [value(row) for row in drawn[name]], label=name, **LINE | look)
        longest = [row for row in capacity if row.plan == plan]
        axis.plot([row.context for row in longest], [value(row) for row in longest], color=look["color"], **LONG)
    if capacity:
        weights, codes = capacity[0].weights, capacity[0].kv_format
        axis.plot([], [], color="black", label=f"the same, {weights} weights and {codes} KV", **LONG)
    _scales(axis, sorted({row.context for rows in [*drawn.values(), capacity] for row in rows}))


def _scales(axis, contexts: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ends = [n for n in contexts if n <= 262144 and n != 131072] + contexts[-1:]
    axis.set_xticks(ends, [tokens(n) if n % 1000 else f"{n // 1000000}M" for n in ends])
    axis.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(plt.matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.minorticks_off()


def _quality(axis, results: Results) -> None:
    for name, plan in QUALITY.items():
        rows = sorted(results.of(plan, "passkey"), key=lambda row: row.length)
        look = LINE | (SERIES[name][2] if name in SERIES else EVEN)
        values = [100 * row.exact for row in rows]
        errors = [[100 * (r.exact - r.exact_low) for r in rows], [100 * (r.exact_high - r.exact) for r in rows]]
        axis.errorbar([row.length for row in rows], values, errors, label=name, capsize=2, **look)
    lengths = sorted({row.length for row in rows})
    axis.set_xticks(lengths, [tokens(n) for n in lengths])
    axis.set_ylim(-3, 105)
