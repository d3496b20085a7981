"""`zigzag plans`: the gallery of plans for models by name."""

from pathlib import Path
from typing import Annotated

import typer

from .app import app, console, one_line_errors


@app.command()
@one_line_errors
def plans(
    model: Annotated[
        str | None, typer.Argument(help="Model name, or a folder of that name. Without it, what there is is listed.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where to write the plan; else it is only shown.")] = None,
    retrieval_ratio: Annotated[
        float | None,
        typer.Option("--retrieval-ratio", "-r", help="Share of layers that keep every token; default 0.5, or the plan's own."),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Whose scores; default: the first that is listed for the model.")] = None,
    sink: Annotated[int | None, typer.Option(help="First tokens that streaming layers keep; default: the source's.")] = None,
    window: Annotated[int | None, typer.Option(help="Last tokens that streaming layers keep; default: the source's.")] = None,
) -> None:
    """Plans from published scores: list them, or make the one of a model. Check it with `zigzag eval` before you rely on it."""
    from ..planning.gallery import entries, load_plan

    if model is None:
        options = {"output": output, "retrieval-ratio": retrieval_ratio, "source": source, "sink": sink, "window": window}
        if given := [f"--{name}" for name, value in options.items() if value is not None]:
            raise ValueError(f"{', '.join(given)} needs a MODEL; `zigzag plans` alone lists the models")
        _list(entries())
        return
    plan = load_plan(model, retrieval_ratio, source=source, sink=sink, window=window)
    if output is not None:
        plan.save(output)
    console.print(plan.summary(), highlight=False)
    if output is not None:
        console.print(f"wrote {output}", highlight=False)


def _list(found) -> None:
    rows = [("model", "retrieval ratio", "method", "source", "licence")]
    for entry in found:
        low, high = entry.ratios
        ratio = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        rows.append((entry.model, ratio, entry.method, entry.source, entry.licence))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", "Sources"]
    for name, entry in {entry.source: entry for entry in found}.items():
        lines.append(f"{name}: {entry.score}; {entry.url}, {entry.version} of {entry.date}")
    lines += ["", "Further names"]
    for model, (same, finetunes) in {entry.model: (entry.same, entry.finetunes) for entry in found}.items():
        lines += [f"{model}, also called: {', '.join(same)}"] if same else []
        lines += [f"{model}, fine-tuned as: {', '.join(finetunes)}"] if finetunes else []
    lines += ["", "Each plan says what was measured of it: zigzag plans MODEL. Measure it on your task before you rely on it."]
    console.print("\n".join(lines), highlight=False)
