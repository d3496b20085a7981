"""The figures of a comparison: quality of all methods at equal budgets, and what their plans have in common."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from .. import plots
from .settings import FULL
from .table import Line, Overlap

_EQUAL = {"kv_bytes": "equal KV bytes", "ms": "equal milliseconds"}
_LEVEL = {"layer": "whole layers", "head": "single heads"}
_MAX_NAME = 16  # characters of a line of a method's name


def draw_all(lines: Sequence[Line], overlaps: Sequence[Overlap], folder: Path) -> list[Path]:
    """A figure per task and quantity, `compare_<task>_<quantity>.png`, and `compare_overlap.png` if there are two methods.

    Raises ValueError if there are more methods than a figure has room for.
    """
    written = []
    for task in dict.fromkeys(line.task for line in lines):
        mine = [line for line in lines if line.task == task]
        for quantity in plots.quantities(mine):
            written.append(_quality(mine, quantity, folder / f"compare_{quote(task, safe=' ')}_{quantity}.png"))
    return [*written, *([_common(lines[0], overlaps, folder / "compare_overlap.png")] if overlaps else [])]


def _quality(lines: Sequence[Line], quantity: str, path: Path) -> Path:
    """A panel per budget and level: quality over the ratio that the budget follows from. Full attention is dashed across."""
    plt = plots.pyplot()
    plots.check_room({"methods": {line.method for line in lines}})
    panels = list(dict.fromkeys((line.equal, line.level) for line in lines if line.method != FULL))
    down, across = len({equal for equal, _ in panels}), len({level for _, level in panels})
    methods = list(dict.fromkeys(line.method for line in lines))
    with plt.rc_context(plots.STYLE):
        size = (1.4 + 3.7 * across, 1.4 + 3.1 * down)
        figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained", sharey=True)
        figure.get_layout_engine().set(wspace=0.06)
        handles: dict = {}
        for axis, (equal, level) in zip(axes.flat, panels, strict=True):
            own = [line for line in lines if (line.equal, line.level) == (equal, level) or line.method == FULL]
            series = {}
            for method in methods:  # all of them: a method has one look in every panel
                groups = {r: [x for x in own if (x.method, x.ratio) == (method, r)] for r in sorted({x.ratio for x in own})}
                series[method] = [(ratio, *plots.mean_interval(group, quantity)) for ratio, group in groups.items() if group]
            plots.draw_lines(axis, series, quantity)
            axis.set_title(f"{_LEVEL[level]}, {_EQUAL[equal]}", fontsize=11)
            ratios = sorted({line.ratio for line in own if line.method != FULL})
            axis.set_xticks([100 * ratio for ratio in ratios], [_tick(own, ratio) for ratio in ratios])
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        for axis in axes[-1]:  # labels of the whole figure would stand where the legend does
            axis.set_xlabel("share of layers that gives the budget")
        for axis in axes[:, 0]:
            axis.set_ylabel(plots.wrapped(plots.LABEL[quantity], 24))
        title = plots.wrapped(f"{lines[0].task}: {plots.conditions(lines)}{_context(lines)}", int(11 * size[0]))
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        plots.legend_below(figure, list(handles.values()), list(handles))
        plots.save(figure, path)
    return path


def _context(lines: Sequence[Line]) -> str:
    sources = [line.ms_from for line in lines if line.ms_from]
    return f"; budgets at {lines[0].context:,} tokens" + (f", milliseconds {sources[0]}" if sources else "")


def _tick(lines: Sequence[Line], ratio: float) -> str:
    line = next(line for line in lines if line.ratio == ratio and line.method != FULL)
    unit = f"{line.limit / 1e6:,.3g} MB" if line.equal == "kv_bytes" else f"{line.limit:.3g} ms"
    return f"{100 * ratio:g}%\n{unit}"


def _common(line: Line, overlaps: Sequence[Overlap], path: Path) -> Path:
    """A panel per level and ratio, at equal KV bytes if that was asked for: Jaccard's index of every two methods' plans."""
    plt = plots.pyplot()
    equal = overlaps[0].equal
    shown = [each for each in overlaps if each.equal == equal]
    panels = list(dict.fromkeys((each.level, each.ratio) for each in shown))
    names = list(dict.fromkeys(name for each in shown for name in (each.method, each.other)))
    plots.check_room({"methods": names})
    down, across = len({level for level, _ in panels}), len({ratio for _, ratio in panels})
    side = max(1.6, 0.62 * len(names))
    with plt.rc_context(plots.STYLE):
        size = (3.0 + across * (side + 0.3), 1.6 + down * (side + 0.5))
        figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained", sharex=True, sharey=True)
        levels = list(dict.fromkeys(level for level, _ in panels))
        ratios = list(dict.fromkeys(ratio for _, ratio in panels))
        for level, ratio in panels:
            axis = axes[levels.index(level)][ratios.index(ratio)]
            image = _matrix(axis, [each for each in shown if (each.level, each.ratio) == (level, ratio)], names)
            axis.set_title(f"{_LEVEL[level]}, {100 * ratio:g}%", fontsize=11)
        figure.colorbar(image, ax=axes, label="Jaccard index")
        title = f"What the plans retrieve in common, {_EQUAL[equal]}: {line.model}, {line.dtype}"
        figure.suptitle(plots.wrapped(title, int(11 * size[0])), fontsize=11, x=0.01, ha="left")
        plots.save(figure, path)
    return path


def _matrix(axis, overlaps: Sequence[Overlap], names: Sequence[str]):
    grid = [[float("nan")] * len(names) for _ in names]
    for each in overlaps:
        for one, other in ((each.method, each.other), (each.other, each.method)):
            grid[names.index(one)][names.index(other)] = each.jaccard
    image = axis.imshow(grid, cmap="viridis", vmin=0.0, vmax=1.0)
    for row, values in enumerate(grid):
        for column, value in enumerate(values):
            if value == value:
                color = "white" if value < 0.6 else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=9, color=color)
    labels = [plots.wrapped(name, _MAX_NAME) for name in names]
    axis.set_xticks(range(len(names)), labels, rotation=45, ha="right", fontsize=9)
    axis.set_yticks(range(len(names)), labels, fontsize=9)
    return image
