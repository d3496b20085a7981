"""Figures of evaluation rows: heat maps over length and depth, and quality over the share that streams. Needs matplotlib."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

from ..planning.writing import write
from .evaluate import Row

# Okabe-Ito: told apart by colour-blind readers (https://jfly.uni-koeln.de/color/).
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
_MARKERS = "osD^vPX*"
_STYLE = {"font.size": 11, "figure.dpi": 160, "axes.axisbelow": True, "text.parse_math": False, "legend.frameon": False}
_LABEL = {"exact": "exact matches, %", "logprob": "log-probability of the answer per token"}
_PANELS_A_ROW = 4
_MAX_VALUES, _MAX_INCHES = 100, 60.0  # of each axis and of the plans; of a side of a figure

Point = tuple[float, float, float, float]  # share that streams, value, and its 95% interval


def draw_all(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Draws what the rows are enough for: a heat map per task with depths, curves per task with three budgets or more.

    Returns the files written (`<task>_<quantity>.png`, `<task>_<quantity>_budget.png`), none if nothing could be drawn. In the
    names, what is special in a path is percent-encoded.

    Raises:
        ValueError: there are more plans, lengths or depths than a figure has room for.
    """
    folder, written = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for task in dict.fromkeys(row.task for row in rows):
        mine = [row for row in rows if row.task == task]
        name = quote(task, safe=" ")  # a task may be called anything: no folder, and no two tasks in one file
        for quantity in ("logprob",) if task == "perplexity" else ("exact", "logprob"):
            if any(row.depth is not None for row in mine):
                written.append(heat_maps(mine, quantity, folder / f"{name}_{quantity}.png"))
            lines = by_series(mine, quantity)
            if len({share for points in lines.values() for share, *_ in points}) >= 3:
                written.append(curves(lines, task, quantity, folder / f"{name}_{quantity}_budget.png"))
    return written


def streaming_share(row: Row) -> float:
    """Share of the layers, or of the heads of a head-level plan, that stream."""
    kinds = row.kinds.replace("/", "")
    return kinds.count("1") / len(kinds)


def by_series(rows: Sequence[Row], quantity: str) -> dict[str, list[Point]]:
    """Points per plan, all lengths and depths averaged. Plans whose names differ in a last "-50%" only make one line."""
    plans: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        plans.setdefault((re.sub(r"-\d+%$", "", row.plan), streaming_share(row)), []).append(row)
    lines: dict[str, list[Point]] = {}
    for (name, share), group in plans.items():
        lines.setdefault(name, []).append((share, *mean_interval(group, quantity)))
    return {name: sorted(points) for name, points in lines.items()}


def mean_interval(rows: Sequence[Row], quantity: str) -> tuple[float, float, float]:
    """Mean of a quantity over rows with equal weight, and its interval: half widths add up in squares."""
    value = fmean(getattr(row, quantity) for row in rows)
    low, high = (
        sum((getattr(row, f"{quantity}_{end}") - getattr(row, quantity)) ** 2 for row in rows) ** 0.5 / len(rows)
        for end in ("low", "high")
    )
    return value, value - low, value + high


def heat_maps(rows: Sequence[Row], quantity: str, path: Path) -> Path:
    """One panel per plan: depth over length, all with one color scale."""
    plt = _pyplot()
    rows = [row for row in rows if row.depth is not None]
    names = list(dict.fromkeys(row.plan for row in rows))
    lengths, depths = sorted({row.length for row in rows}), sorted({row.depth for row in rows})
    _check_room({"plans": names, "lengths": lengths, "depths": depths})
    across = min(len(names), _PANELS_A_ROW)
    down = -(-len(names) // across)
    scale = 100.0 if quantity == "exact" else 1.0
    ends = (0.0, 100.0) if quantity == "exact" else (min(row.logprob for row in rows), 0.0)
    with plt.rc_context(_STYLE):
        size = (1.6 + across * max(2.2, 0.55 * len(lengths)), down * max(2.6, 0.34 * len(depths) + 1.2))
        size = tuple(min(side, _MAX_INCHES) for side in size)
        figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained", sharex=True, sharey=True)
        for axis, name in zip(axes.flat, names, strict=False):
            grid = [[float("nan")] * len(lengths) for _ in depths]
            for row in rows:
                if row.plan == name:
                    grid[depths.index(row.depth)][lengths.index(row.length)] = scale * getattr(row, quantity)
            image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=ends[0], vmax=ends[1])
            axis.set_title(name, fontsize=11)
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        for axis in axes.flat[len(names) :]:
            axis.set_axis_off()
        for axis in axes.flat[max(len(names) - across, 0) : len(names)]:
            axis.tick_params(labelbottom=True)  # also where the panel below is empty
        figure.supxlabel("tokens of the prompt", fontsize=11)
        figure.supylabel("depth of the needle", fontsize=11)
        figure.colorbar(image, ax=axes, label=f"{rows[0].task}: {_LABEL[quantity]}")
        _save(figure, path)
    return path


def curves(lines: Mapping[str, Sequence[Point]], task: str, quantity: str, path: Path, unit: str = "layers") -> Path:
    """Quality over the share that streams, with 95% intervals. A line of one point, such as full attention, is dashed across."""
    plt = _pyplot()
    _check_room({"plans": lines})
    scale = 100.0 if quantity == "exact" else 1.0
    with plt.rc_context(_STYLE):
        figure, axis = plt.subplots(figsize=(8.4, 4.6), layout="constrained")
        for name, points in lines.items():
            if len(points) == 1:
                axis.axhline(scale * points[0][1], color="#555555", linestyle="--", linewidth=1.2, label=name)
        drawn = {name: points for name, points in lines.items() if len(points) > 1}
        for index, (name, points) in enumerate(drawn.items()):
            color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
            style = "-" if index < len(_COLORS) else ":"
            shift = 0.6 * (index - (len(drawn) - 1) / 2)  # percent; intervals side by side, not on top of each other
            shares = [100.0 * share + shift for share, *_ in points]
            values = [scale * value for _, value, *_ in points]
            errors = [[scale * (v - low) for _, v, low, _ in points], [scale * (high - v) for _, v, _, high in points]]
            look = {"color": color, "marker": marker, "linestyle": style, "markersize": 5, "linewidth": 1.6, "capsize": 2}
            axis.errorbar(shares, values, errors, label=name, **look)
        axis.set_xlabel(f"streaming {unit}, %")
        axis.set_ylabel(f"{task}: {_LABEL[quantity]}")
        axis.grid(color="#DDDDDD")
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", fontsize=9)
        _save(figure, path)
    return path


def _check_room(counted: Mapping[str, Sequence | Mapping]) -> None:
    for what, values in counted.items():
        if len(values) > _MAX_VALUES:
            raise ValueError(f"{len(values)} {what} are more than a figure has room for, {_MAX_VALUES}")


def _save(figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:] or "png")
    _pyplot().close(figure)
    write(path, content.getvalue())


def _pyplot():
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'zigzag_ext[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
