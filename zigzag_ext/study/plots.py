"""Figures of evaluation rows: heat maps over length and depth, and quality over the share that retrieves. Needs matplotlib."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

from ..planning.writing import write
from .evaluate import Row

# Okabe-Ito, told apart by colour-blind readers (https://jfly.uni-koeln.de/color/), without its yellow, and two more.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D31", "#6A3D9A")
_MARKERS = "osD^vPX*h"
_DASHES = ("-", ":", "-.", (0, (1, 3)))
_REFERENCE = "#555555"
STYLE = {"font.size": 11, "figure.dpi": 160, "axes.axisbelow": True, "text.parse_math": False, "legend.frameon": False}
LABEL = {"exact": "exact matches, %", "logprob": "log-probability of the answer per token"}
_PANELS_A_ROW = 4
_MAX_VALUES, _MAX_INCHES = 100, 60.0  # of each axis and of the plans; of a side of a figure
_MAX_TITLE, _MAX_NAME, _MAX_LEGEND = 90, 22, 40  # characters of a line of a title, of a panel's name and of a legend's entry
_SHIFT, _MAX_SHIFT = 0.6, 6.0  # percent by which intervals stand side by side, not on top of each other; of all lines together

Point = tuple[float, float, float, float]  # share that retrieves, value, and its 95% interval


def draw_all(rows: Sequence[Row], folder: str | Path) -> list[Path]:
    """Draws what the rows are enough for: a heat map per task with depths, curves per task with three shares or more.

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
        for quantity in quantities(mine):
            if any(row.depth is not None for row in mine):
                written.append(heat_maps(mine, quantity, folder / f"{name}_{quantity}.png"))
            lines = by_series(mine, quantity)
            if len({share for points in lines.values() for share, *_ in points}) >= 3:
                written.append(curves(lines, quantity, folder / f"{name}_{quantity}_budget.png", (task, conditions(mine))))
    return written


def quantities(rows: Sequence) -> list[str]:
    """What can be drawn of the rows of one task: perplexity has no exact matches, tasks of RULER have no log-probability."""
    named = ("logprob",) if rows[0].task == "perplexity" else ("exact", "logprob")
    return [name for name in named if any(getattr(row, name) == getattr(row, name) for row in rows)]


def retrieval_share(row: Row) -> float:
    """Share of the layers, or of the heads of a head-level plan, that retrieve."""
    kinds = row.kinds.replace("/", "")
    return kinds.count("0") / len(kinds)


def conditions(rows: Sequence) -> str:
    """What the rows have in common, for a title: model, dtype, device, lengths, prompts, sink and window, and the intervals."""
    listed = lambda values: ", ".join(dict.fromkeys(values))  # noqa: E731
    lengths = listed(f"{length:,}" for length in sorted({row.length for row in rows}))
    sizes = listed(f"{row.sink} + {row.window}" for row in rows if row.window)
    counts: dict[tuple, int] = {}
    for row in set(rows):  # a row may stand for several plans that are the same
        place = tuple(getattr(row, name, "") for name in ("method", "level", "equal", "ratio", "plan", "compress", "kinds"))
        counts[place, row.length] = counts.get((place, row.length), 0) + row.prompts
    prompts = listed(f"{count:,}" for count in sorted(set(counts.values())))
    parts = [f"{listed(row.model for row in rows)}, {listed(row.dtype for row in rows)}, {listed(row.device for row in rows)}"]
    parts += [f"{lengths} tokens, {prompts} prompts each", *([f"sink + window {sizes}"] if sizes else []), "95% intervals"]
    return "; ".join(parts)


def by_series(rows: Sequence[Row], quantity: str) -> dict[str, list[Point]]:
    """Points per plan, all lengths and depths averaged, at the share of the plan that retrieves.

    Plans whose names differ in nothing but the percentage in the end that retrieves or streams in them make one line:
    plan25 and plan50, a-25% and a-50%.
    """
    plans: dict[tuple[str, float], list[Row]] = {}
    models = {row.model for row in rows}
    for row in rows:
        plans.setdefault((_told(row, _series(row), models), retrieval_share(row)), []).append(row)
    lines: dict[str, list[Point]] = {}
    for (name, share), group in plans.items():
        lines.setdefault(name, []).append((share, *mean_interval(group, quantity)))
    return {name: sorted(points) for name, points in lines.items()}


def _series(row: Row) -> str:
    """The plan's name, without a number in its end that says how much of the plan retrieves, or streams, in percent."""
    found = re.fullmatch(r"(.*?)[-_ ]?(\d+(?:\.\d+)?)%?", row.plan)
    share, units = retrieval_share(row), len(row.kinds.replace("/", ""))
    if not found or not found[1]:
        return row.plan
    off = min(abs(float(found[2]) / 100 - each) for each in (share, 1 - share))
    return found[1] if off <= 0.5 / units + 0.005 else row.plan  # a number of layers that is whole, a percentage that is


def _told(row: Row, name: str, models: set[str]) -> str:
    """`name` with what else tells the row from others: how prompts were compressed, and the model where there are several."""
    return ", ".join(filter(None, (name, row.compress, row.model if len(models) > 1 else "")))


def mean_interval(rows: Sequence, quantity: str) -> tuple[float, float, float]:
    """Mean of a quantity over rows with equal weight, and its interval: half widths add up in squares."""
    value = fmean(getattr(row, quantity) for row in rows)
    low, high = (
        sum((getattr(row, f"{quantity}_{end}") - getattr(row, quantity)) ** 2 for row in rows) ** 0.5 / len(rows)
        for end in ("low", "high")
    )
    return value, value - low, value + high


def heat_maps(rows: Sequence[Row], quantity: str, path: Path) -> Path:
    """One panel per plan: depth over length, all with one color scale."""
    plt = pyplot()
    rows = [row for row in rows if row.depth is not None]
    models = {row.model for row in rows}
    names = list(dict.fromkeys(_told(row, row.plan, models) for row in rows))
    lengths, depths = sorted({row.length for row in rows}), sorted({row.depth for row in rows})
    check_room({"plans": names, "lengths": lengths, "depths": depths})
    across = min(len(names), _PANELS_A_ROW)
    down = -(-len(names) // across)
    scale = 100.0 if quantity == "exact" else 1.0
    ends = (0.0, 100.0) if quantity == "exact" else (min(row.logprob for row in rows), 0.0)
    with plt.rc_context(STYLE):
        size = (1.6 + across * max(2.2, 0.55 * len(lengths)), 0.6 + down * max(2.6, 0.34 * len(depths) + 1.2))
        size = tuple(min(side, _MAX_INCHES) for side in size)
        figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained", sharex=True, sharey=True)
        for axis, name in zip(axes.flat, names, strict=False):
            grid = [[float("nan")] * len(lengths) for _ in depths]
            for row in rows:
                if _told(row, row.plan, models) == name:
                    grid[depths.index(row.depth)][lengths.index(row.length)] = scale * getattr(row, quantity)
            image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=ends[0], vmax=ends[1])
            axis.set_title(wrapped(name, _MAX_NAME), fontsize=11)
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45)
            axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        for axis in axes.flat[len(names) :]:
            axis.set_axis_off()
        for axis in axes.flat[max(len(names) - across, 0) : len(names)]:
            axis.tick_params(labelbottom=True)  # also where the panel below is empty
        figure.supxlabel("tokens of the prompt", fontsize=11)
        figure.supylabel("depth of the needle", fontsize=11)
        figure.colorbar(image, ax=axes, label=wrapped(LABEL[quantity], 28), aspect=20 * down)
        characters = int(12 * size[0])
        figure.suptitle(wrapped(f"{rows[0].task}: {conditions(rows)}", characters), fontsize=11, x=0.01, ha="left")
        save(figure, path)
    return path


def curves(lines: Mapping[str, Sequence[Point]], quantity: str, path: Path, words: tuple[str, str], unit: str = "layers") -> Path:
    """Quality over the share that retrieves, with 95% intervals. What retrieves everywhere is dashed across.

    words: the task, and what the figure's rows have in common.
    """
    plt = pyplot()
    check_room({"plans": lines})
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8.4, 4.8), layout="constrained")
        draw_lines(axis, lines, quantity)
        axis.set_xlabel(f"{unit} that retrieve, %")
        axis.set_ylabel(LABEL[quantity])
        figure.suptitle(wrapped(f"{words[0]}: {words[1]}", _MAX_TITLE), fontsize=11, x=0.01, ha="left")
        legend_below(figure, *axis.get_legend_handles_labels())
        save(figure, path)
    return path


def draw_lines(axis, lines: Mapping[str, Sequence[Point]], quantity: str) -> None:
    """A line per entry, each with a look of its own, at its shares in percent; what has the one share 1 is dashed across."""
    scale = 100.0 if quantity == "exact" else 1.0
    whole = {name: points for name, points in lines.items() if [share for share, *_ in points] == [1.0]}
    others = {name: points for name, points in lines.items() if name not in whole}
    for index, (name, points) in enumerate(whole.items()):
        dash = _DASHES[index % len(_DASHES)] if index else "--"
        label = wrapped(name, _MAX_LEGEND)
        axis.axhline(scale * points[0][1], color=_REFERENCE, linestyle=dash, linewidth=1.2, label=label)
    for index, (name, points) in enumerate(others.items()):
        color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
        shift = min(_SHIFT, _MAX_SHIFT / len(others)) * (index - (len(others) - 1) / 2)
        shares = [100.0 * share + shift for share, *_ in points]
        values = [scale * value for _, value, *_ in points]
        errors = [[scale * (v - low) for _, v, low, _ in points], [scale * (high - v) for _, v, _, high in points]]
        look = {"color": color, "marker": marker, "linestyle": _DASHES[index // len(_COLORS) % len(_DASHES)]}
        look |= {"markersize": 5, "linewidth": 1.6, "capsize": 2}
        axis.errorbar(shares, values, errors, label=wrapped(name, _MAX_LEGEND), **look)
    axis.grid(color="#DDDDDD")
    axis.spines[["top", "right"]].set_visible(False)


def legend_below(figure, handles: Sequence, labels: Sequence[str]) -> None:
    """A legend below all axes, in as many columns as there is room for; the figure grows by what it takes."""
    width, height = figure.get_size_inches()
    lines = [label.split("\n") for label in labels]
    longest = max((len(line) for label in lines for line in label), default=0)
    columns = max(1, min(int(width / (0.7 + 0.085 * longest)), len(labels)))
    rows = -(-len(labels) // columns)
    figure.set_figheight(height + 0.2 * rows * max((len(label) for label in lines), default=0))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


def wrapped(text: str, width: int) -> str:
    """`text` in lines of at most `width` characters, broken at blanks; words that are longer also after . : / _ and -."""
    pieces = []
    for word in re.findall(r"\S+\s*", text):
        pieces += (
            [word] if len(word.rstrip()) <= width else re.findall(rf"[^.:/_-]{{1,{width - 1}}}[.:/_-]*\s*|[.:/_-]+\s*", word)
        )
    lines = [""]
    for piece in pieces:
        if lines[-1] and len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def check_room(counted: Mapping[str, Sequence | Mapping]) -> None:
    for what, values in counted.items():
        if len(values) > _MAX_VALUES:
            raise ValueError(f"{len(values)} {what} are more than a figure has room for, {_MAX_VALUES}")


def save(figure, path: Path) -> None:
    """Writes the figure with all that it shows, also what sticks out, and closes it."""
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:] or "png", bbox_inches="tight", facecolor="white")
    pyplot().close(figure)
    write(path, content.getvalue())


def pyplot():
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'zigzag_ext[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
