"""`zigzag compare`: methods that choose layers or heads, side by side at equal budgets."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from ..study.identify import METHODS
from . import arguments
from .app import app, console, one_line_errors, quiet_transformers
from .progress import load, waiting
from .study import RULER_NAMES, TASK_NAMES, task_named

_METHODS = f"{', '.join(METHODS)}; even (no scores); package.module:function; a score file. May be repeated."


@app.command()
@one_line_errors
def compare(
    model: arguments.Model,
    method: Annotated[list[str] | None, typer.Option(help=f"{_METHODS} Default retrieval, lazy, even.")] = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(
            "--ratio", "-r", help="Share of retrieval layers that a budget is made for. May be repeated; default 0.25, 0.5, 0.75."
        ),
    ] = None,
    level: Annotated[
        list[str] | None, typer.Option(help="layer: whole layers; head: every KV head for itself. May be repeated; default both.")
    ] = None,
    equal: Annotated[
        list[str] | None, typer.Option(help="What plans have in common: kv-bytes, ms. May be repeated; default both.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"{TASK_NAMES}; of RULER (extra `ruler`): {RULER_NAMES}. May be repeated; default passkey."),
    ] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens per prompt. May be repeated; default 1024.")] = None,
    depth: Annotated[list[float] | None, typer.Option(help="Place of the needle, 0 to 1. May be repeated.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts per length and depth.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the prompts of methods and tasks.")] = 0,
    sink: Annotated[int, typer.Option(help="First tokens that what streams keeps.")] = 64,
    window: Annotated[int, typer.Option(help="Last tokens that what streams keeps.")] = 256,
    context: Annotated[
        int | None, typer.Option(help="Tokens at which KV bytes and ms count; default the model's context, at most 131072.")
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="Cost table (JSON) for ms; default: layers are timed on this machine, one by one.")
    ] = None,
    identify_tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt of the methods; default: the method's.")] = None,
    identify_prompts: Annotated[int | None, typer.Option(help="Prompts of the methods; default: the method's.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the comparison.")] = Path("comparison"),
    figures: Annotated[bool, typer.Option(help="Draw figures into the folder (needs matplotlib).")] = True,
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
) -> None:
    """Compare methods x ratios x tasks at equal KV bytes and at equal milliseconds, and how much their plans have in common.

    An interrupted run goes on where it stopped if the same command is given again; other methods, ratios or tasks are added.
    """
    quiet_transformers()
    from ..planning.writing import check_writable
    from ..study import evaluate, plots
    from ..study.compare import Settings, sources_of
    from ..study.compare import compare as run
    from ..study.compare import figures as drawing
    from ..study.loading import load_config
    from .checks import check_options

    given = {name: value for name, value in (("tokens", identify_tokens), ("prompts", identify_prompts)) if value is not None}
    settings = Settings(
        sources_of(method or ["retrieval", "lazy", "even"], **given),
        ratios=tuple(ratio or (0.25, 0.5, 0.75)),
        levels=tuple(level or ("layer", "head")),
        budgets=tuple(name.replace("-", "_") for name in equal or ("kv_bytes", "ms")),
        tasks=tuple(task_named(evaluate.TASKS | evaluate.RULER, name) for name in task or ["passkey"]),
        lengths=tuple(length or (1024,)),
        depths=tuple(depth or (0.0, 0.25, 0.5, 0.75, 1.0)),
        prompts=prompts, seed=seed, sink=sink, window=window, context=context, costs=costs,
        tokens=identify_tokens, samples=identify_prompts,
    )  # fmt: skip
    check_options(device, dtype, None)
    settings.check(load_config(model))
    if figures:
        plots.pyplot()
    output.mkdir(parents=True, exist_ok=True)
    check_writable(output / "compare.csv")
    network, tokenizer = load(model, device, dtype)
    with waiting("comparing methods") as line:
        lines, overlaps = run(network, tokenizer, settings, output, line.step)
    _show(lines)
    written = [output / name for name in ("rows.csv", "compare.csv", "overlap.csv")]
    for path in [*written, *(drawing.draw_all(lines, overlaps, output) if figures else [])]:
        console.print(f"wrote {path}", highlight=False)


def _show(lines) -> None:
    """One line per plan, task and length; compare.csv has more columns."""
    headers = ("task", "tokens", "ratio", "within", "level", "method", "retrieve", "exact", "log-probability")
    table = Table(*(Column(name, no_wrap=name != "method", overflow="fold") for name in headers), box=None, padding=(0, 2, 0, 0))
    for line in lines:
        limit = (
            "-" if line.limit is None else f"{line.limit / 1e6:,.3g} MB" if line.equal == "kv_bytes" else f"{line.limit:.3g} ms"
        )
        exact = f"{line.exact:.0%} [{100 * line.exact_low:.0f}, {100 * line.exact_high:.0f}]"
        logprob = f"{line.logprob:.3f} ± {line.logprob_high - line.logprob:.3f}"
        exact = "-" if line.task == "perplexity" else exact
        logprob = "-" if math.isnan(line.logprob) else logprob
        names = (line.task, str(line.length), f"{line.ratio:.0%}", limit, line.level or "-", line.method)
        table.add_row(*names, f"{line.retrieves:.0%}", exact, logprob)
    console.print(table)
    if lines[0].ms_from:
        console.print(f"ms: attention of a decode step at {lines[0].context:,} tokens, {lines[0].ms_from}", highlight=False)
