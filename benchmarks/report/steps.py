"""Tables and figures of whole models (step*.csv, layers*.csv) and of prompt chunks (prefill*.csv). Called by __main__.py."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt

from . import figures
from .comparisons import of_chunks
from .documents import table
from .records import CapacityRecord, PrefillRecord, Record, StepRecord

GB = 1e9
IMPLS = {
    "zigzag_compiled": "zigzag_ext, compiled",
    "zigzag_eager": "zigzag_ext, eager",
    "transformers_compiled": "transformers, compiled, static cache",
    "transformers_eager": "transformers, eager",
    "duo_recreation": "DuoAttention's dispatch, re-created",
}
PLANS = {
    "retrieval_100": "all layers retrieve",
    "exclusive_50": "50% of layers retrieve",
    "exclusive_25": "25% of layers retrieve",
    "heads_50": "50% of heads retrieve",
    "full": "full attention",
}


def tokens(n: int) -> str:
    return f"{n // 1024}K" if n % 1024 == 0 else f"{n:,}"


def step_table(rows: list[StepRecord]) -> str:
    """Decode steps: wall time through generate() and in a loop of forwards, and what they are made of."""
    cells: dict[tuple, dict[str, StepRecord]] = {}
    for row in rows:
        if row.phase in ("step", "generate"):
            cells.setdefault((row.model, row.context, row.plan, row.impl), {})[row.phase] = row
    header = [
        "model",
        "context",
        "plan",
        "run by",
        "generate(), ms",
        "loop, ms",
        "GPU busy, ms",
        "launches",
        "KV, GB",
        "peak, GB",
    ]
    lines = []
    for (model, context, plan, impl), phases in sorted(cells.items(), key=lambda item: (item[0][0], item[0][1], item[0][2])):
        one = next(iter(phases.values()))
        wall = [f"{phases[phase].wall_ms:.2f}" if phase in phases else "–" for phase in ("generate", "step")]
        busy = [f"{one.gpu_ms:.2f}", f"{one.launches:,.0f}", f"{one.kv_bytes / GB:.2f}", f"{one.peak_bytes / GB:.1f}"]
        lines.append([model, tokens(context), PLANS.get(plan, plan), IMPLS.get(impl, impl), *wall, *busy])
    return table(header, lines, 4)


def highlights(rows: list[StepRecord]) -> list[StepRecord]:
    """Rows of the model that most rows are of, at 128K tokens, or at its longest context."""
    steps = [row for row in rows if row.phase == "generate"]
    model = max((row.model for row in steps), key=lambda name: sum(row.model == name for row in steps), default=None)
    contexts = {row.context for row in steps if row.model == model}
    context = 128 * 1024 if 128 * 1024 in contexts else max(contexts, default=0)
    return [row for row in rows if (row.model, row.context) == (model, context)]


def prompt_table(rows: list[StepRecord]) -> str:
    """Whole prompts through the model, and how much faster a plan is than full attention in all layers."""
    prompts = [row for row in rows if row.phase == "prefill"]
    full = {(r.model, r.context, r.impl): r.wall_ms for r in prompts if r.plan == "retrieval_100"}
    lines = []
    for r in sorted(prompts, key=lambda r: (r.model, r.context, r.plan)):
        whole = full.get((r.model, r.context, r.impl))
        ratio = f"{whole / r.wall_ms:.2f}x" if whole else "–"
        memory = [f"{r.kv_bytes / GB:.2f}", f"{r.beside_bytes / GB:.2f}"]
        names = [r.model, tokens(r.context), PLANS.get(r.plan, r.plan), IMPLS.get(r.impl, r.impl)]
        lines.append([*names, f"{r.wall_ms * 1e-3:.2f}", ratio, *memory])
    return table(["model", "prompt", "plan", "run by", "wall, s", "speed-up", "KV, GB", "beside weights and KV, GB"], lines, 4)


def layers_table(rows: list[Record]) -> str:
    """The attention of all layers of a model as one graph, against a pure read of the same bytes."""
    chains: dict[str, dict[str, Record]] = {}
    for row in rows:
        chains.setdefault(row.scenario, {})[row.impl] = row
    lines = []
    for name, impls in chains.items():
        ours, read = impls["zigzag"].p50_us, impls["read"].p50_us
        lines.append([name, f"{ours:,.0f}", f"{read:,.0f}", f"{100 * read / ours:.0f}%", f"{impls['zigzag'].gbps:,.0f}"])
    return table(["chain", "zigzag, us", "pure read, us", "of read", "GB/s"], lines)


def capacity_table(rows: list[CapacityRecord]) -> str:
    """The longest contexts: time of a token against the time to read the weights and the cache."""
    header = ["context", "plan", "weights", "KV", "run by", "ms per token", "floor, ms", "KV, GB", "used, GB", "largest error"]
    lines = []
    for r in rows:
        names = [tokens(r.context), PLANS.get(r.plan, r.plan), r.weights, r.kv_format, IMPLS.get(r.impl, r.impl)]
        numbers = [f"{r.wall_ms:.1f}", f"{r.floor_ms:.1f}", f"{r.kv_bytes / GB:.1f}", f"{r.used_bytes / GB:.1f}"]
        lines.append([*names, *numbers, f"{r.largest_error_pct:.2f}%"])
    return table(header, lines, 5)


def prefill_table(rows: list[PrefillRecord]) -> str:
    lines = []
    for row in sorted(rows, key=lambda row: (row.scenario, row.p50_us)):
        time = f"{row.p50_us:,.0f}" if row.p50_us >= 1000 else f"{row.p50_us:.1f}"
        lines.append([row.scenario, row.impl, f"{row.tokens:,}", f"{row.past:,}", time, f"{row.tflops:.0f}"])
    comparisons = "\n".join(f"- {line}" for line in of_chunks(rows))
    return f"{comparisons}\n\n" + table(["scenario", "implementation", "tokens", "past", "median, us", "TFLOP/s"], lines, 2)


def draw_steps(rows: list[StepRecord], folder: Path, name: str) -> list[Path]:
    """Latency and memory of a decode step over the context, one figure each; returns the files written."""
    model = max({row.model for row in rows}, key=lambda m: sum(row.model == m for row in rows), default=None)
    steps = [row for row in rows if row.model == model and row.phase == "generate"]
    series: dict[tuple[str, str], list[StepRecord]] = {}
    for row in sorted(steps, key=lambda row: row.context):
        series.setdefault((row.impl, row.plan), []).append(row)
    series = {key: points for key, points in series.items() if len(points) > 1}
    contexts = sorted({row.context for points in series.values() for row in points})
    if len(series) < 2:  # nothing to compare
        return []
    title = f"Decode step of a {model}-shaped model, batch 1, bf16\n{steps[0].gpu}"
    compiled = {key: points for key, points in series.items() if key[0] in ("zigzag_compiled", "transformers_compiled")}
    panels = {
        "latency": ("wall time per token, generate(), ms", lambda row: row.wall_ms, series),
        "memory": ("KV cache, GB", lambda row: row.kv_bytes / GB, compiled),
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, (label, value, shown) in panels.items():
        written.append(folder / f"{name}_{suffix}.png")
        _draw_panel(shown, value, contexts, (title, label), written[-1])
    return written


def _draw_panel(series: dict, value: Callable, contexts: list[int], words: tuple[str, str], target: Path) -> None:
    """One figure: `value` of each row over its context, a line per implementation and plan. `words`: title, label of the axis."""
    with plt.rc_context(figures.STYLE):
        figure, axes = plt.subplots(layout="constrained")
        others = iter(zip(figures.PEER_COLORS, figures.PEER_MARKERS, strict=True))
        for (impl, plan), points in sorted(series.items(), key=lambda item: item[0] != ("zigzag_compiled", "exclusive_50")):
            best = (impl, plan) == ("zigzag_compiled", "exclusive_50")
            color, marker = (figures.OURS, "o") if best else next(others)
            text = f"{IMPLS.get(impl, impl)}: {PLANS.get(plan, plan)}"
            line = {"color": color, "marker": marker, "linewidth": 2.4 if best else 1.3, "markersize": 6 if best else 4.5}
            axes.plot([row.context for row in points], [value(row) for row in points], label=text, **line)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [tokens(n) for n in contexts])
        axes.yaxis.set_major_locator(plt.matplotlib.ticker.LogLocator(base=10, subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(plt.matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        axes.set_xlabel("tokens in the cache")
        axes.set_ylabel(words[1])
        axes.set_title(words[0], fontsize=11, loc="left")
        figure.legend(fontsize=8.5, loc="outside lower center", ncols=2)
        figure.savefig(target, bbox_inches="tight", facecolor="white", metadata={"Software": None})
        plt.close(figure)
