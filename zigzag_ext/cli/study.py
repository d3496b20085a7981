"""`zigzag identify`, `eval`, `lm-eval` and `plot`: which layers of a model may stream, and what a plan costs in quality."""

import functools
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from ..study.identify import METHODS
from . import arguments
from .app import app, console, one_line_errors, quiet_transformers
from .progress import load, waiting

TASK_NAMES = "passkey, multikey, multivalue, second_question, quotation, perplexity"
RULER_NAMES = "niah_single_1, niah_multikey_2, niah_multikey_3, ruler_vt, ruler_cwe, ruler_fwe"


@app.command()
@one_line_errors
def identify(
    model: arguments.Model,
    method: Annotated[
        str,
        typer.Option(
            help="; ".join(f"{name}: {text}" for name, text in METHODS.items())
            + "; package.module:function: your own (docs/compare.md)"
        ),
    ] = "retrieval",
    output: Annotated[Path, typer.Option("--output", "-o", help="Scores: .tsv, .csv, .npy or a folder.")] = Path("scores.tsv"),
    level: Annotated[str | None, typer.Option(help="Of ablation and gates: layer or head.")] = None,
    keep: Annotated[int | None, typer.Option(help="Of greedy: layers left at which it stops; default 1.")] = None,
    exhaustive: Annotated[bool, typer.Option("--exhaustive", help="Of greedy: measure every layer in every round.")] = False,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    sink: Annotated[int, typer.Option(help="First tokens that a streaming layer would keep.")] = 64,
    window: Annotated[int, typer.Option(help="Last tokens that a streaming layer would keep.")] = 256,
    tokens: Annotated[int | None, typer.Option(help="Length of a prompt; default: the method's.")] = None,
    prompts: Annotated[int | None, typer.Option(help="Prompts, or training steps of gates; default: the method's.")] = None,
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
) -> None:
    """Score every KV head of a model: how much it needs the whole context. Give the scores to `zigzag solve`.

    An interrupted run goes on where it stopped if the same command is given again.
    """
    quiet_transformers()
    from ..planning.scores import check_output
    from ..study.identify import identify as run
    from ..study.identify.own import load_function
    from ..study.loading import load_config
    from .checks import check_options

    given = {"level": level, "keep": keep, "exhaustive": exhaustive or None, "tokens": tokens, "prompts": prompts}
    given = {name: value for name, value in given.items() if value is not None}
    if ":" in method:
        load_function(method, **given)
    else:
        task_named(METHODS, method, "method")
    check_options(device, dtype, None)
    check_output(output)
    load_config(model)
    network, tokenizer = load(model, device, dtype)
    with waiting(f"scoring heads by {method}") as line:
        scores = run(
            network, tokenizer, method, seed=seed, sink=sink, window=window, output=output,
            advance=line.update, **given,
        )  # fmt: skip
    best = scores.mean(1).argsort()[::-1][:5]
    console.print(f"{scores.shape[0]} layers x {scores.shape[1]} KV heads by {method}, on {network.device}", highlight=False)
    console.print(f"highest layers: {', '.join(f'{layer} ({scores[layer].mean():.3f})' for layer in best)}", highlight=False)
    console.print(f"wrote {output}", highlight=False)


@app.command("eval")
@one_line_errors
def evaluate(
    model: arguments.Model,
    plan: Annotated[list[Path] | None, typer.Option(help="Plan file. May be repeated.")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"{TASK_NAMES}; of RULER (extra `ruler`): {RULER_NAMES}. May be repeated; default passkey."),
    ] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens per prompt. May be repeated; default 1024, 2048.")] = None,
    depth: Annotated[list[float] | None, typer.Option(help="Place of the needle, 0 to 1. May be repeated.")] = None,
    prompts: Annotated[int, typer.Option(help="Prompts per length and depth.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
    full: Annotated[bool, typer.Option(help="Also evaluate full attention.")] = True,
    kv_format: arguments.KvFormat = None,
    ring_kv_format: arguments.RingKvFormat = None,
    key_smoothing: arguments.KeySmoothing = None,
    compress: arguments.Compress = None,
    compress_method: arguments.CompressMethod = None,
    compress_window: arguments.CompressWindow = None,
    compress_observe: arguments.CompressObserve = None,
    speculate: Annotated[
        str | None, typer.Option(help="Also continue each prompt by speculative decoding: auto, lookup or streaming drafts.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Of --speculate: tokens that a prompt is continued by.")] = 64,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="CSV file that the rows are added to.")] = None,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Of tasks of RULER and --speculate: compile decode steps; the other tasks have none."),
    ] = False,
    weights: arguments.Weights = None,
    device: arguments.Device = "auto",
    device_map: arguments.DeviceMap = None,
    dtype: arguments.Dtype = "auto",
) -> None:
    """Measure what plans keep of a model's quality: needles over lengths and depths, perplexity of long text. Offline.

    Formats of keys and values take the place of those in the plan files, prompts are compressed under these plans; full
    attention keeps the model's own keys and values, and all of them.
    """
    quiet_transformers()
    from ..study import evaluate as tasks
    from .checks import check_options
    from .compression import method_of

    method = method_of(compress, compress_method, compress_window, compress_observe)
    chosen = [task_named(tasks.TASKS | tasks.RULER, name) for name in task or ["passkey"]]
    if method is not None and not plan:
        raise ValueError("--compress needs a --plan, whose retrieval layers it thins out")
    check_options(device, dtype, device_map, speculate, output)
    plans = _plans(model, plan or [], full, (kv_format, ring_kv_format, key_smoothing))
    lengths, depths = length or [1024, 2048], depth or [0.0, 0.25, 0.5, 0.75, 1.0]
    if speculate is not None and (other := [each.name for each in chosen if each.name in tasks.RULER]):
        raise ValueError(f"--speculate continues the prompts of {', '.join(tasks.TASKS)}; not of {', '.join(other)}")
    if compile and speculate is None and not any(each.name in tasks.RULER for each in chosen):
        raise ValueError(f"--compile is for decode steps, and {', '.join(each.name for each in chosen)} have none: leave it out")
    if output is not None:
        tasks.append(output, [])
    network, tokenizer = load(model, device, dtype, device_map, weights=weights)
    with waiting("evaluating prompts") as line:
        total = sum(prompts * (len(depths) if each.has_depth else 1) for each in chosen) * len(plans) * len(lengths)
        rows = []
        line.update(0, total)
        for name, each, tokens in ((n, t, x) for n in plans for t in chosen for x in lengths):
            found = each(
                network, tokenizer, plans[name], lengths=[tokens], depths=depths, prompts=prompts, seed=seed, name=name,
                compress=None if plans[name] is None else method, advance=lambda done: line.update(line.done + done, total),
                **({"compile": compile} if each.name in tasks.RULER else {}),
            )  # fmt: skip
            rows += found
            if output is not None:
                tasks.append(output, found)
    console.print(_table(rows))
    if speculate is not None:
        run = functools.partial(tasks.accepted, network, draft=speculate, new_tokens=new_tokens, compile=compile, compress=method)
        console.print(_speculation_table(run, tokenizer, plans, chosen, lengths, depths, prompts, seed))
    if output is not None:
        console.print(f"wrote {output}", highlight=False)


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
@one_line_errors
def lm_eval(context: typer.Context) -> None:
    """lm-evaluation-harness with the model `zigzag`: --model zigzag --model_args pretrained=MODEL,plan=plan.json --tasks ...

    Everything after `lm-eval` goes to lm_eval's own command line; `zigzag lm-eval -- --help` shows it. Needs the extra `ruler`.
    """
    quiet_transformers()
    from ..study.lm_eval import main

    main(context.args)


@app.command()
@one_line_errors
def plot(
    rows: Annotated[list[Path], typer.Argument(help="CSV files of `zigzag eval`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the figures.")] = Path("figures"),
) -> None:
    """Draw evaluation rows: heat maps over length and depth, and quality over the share of layers that retrieve."""
    from ..study.evaluate import read
    from ..study.plots import draw_all

    written = draw_all([row for path in rows for row in read(path)], output)
    if not written:
        raise ValueError(
            "nothing to draw: a heat map needs rows with depths, a curve plans with three shares of retrieval layers"
        )
    for path in written:
        console.print(f"wrote {path}", highlight=False)


def _plans(model: str, files: list[Path], full: bool, formats: tuple) -> dict:
    """Plans by the name that results give them, checked against the model's config; full attention is None."""
    from .checks import plans_for

    if unprintable := [path for path in files if not path.stem.isprintable()]:
        raise ValueError(f"the results name a plan by its file, so that name must be printable, got {str(unprintable[0])!r}")
    if len({path.stem for path in files} - {"full"} if full else {path.stem for path in files}) != len(files):
        raise ValueError("plan files are told apart by their names, so these must differ (and not be 'full')")
    return ({"full": None} if full else {}) | plans_for(model, {path.stem: path for path in files}, formats)


def task_named(tasks: dict, name: str, what: str = "task"):
    if name not in tasks:
        raise ValueError(f"unknown {what} '{name}'; supported: {', '.join(tasks)}")
    return tasks[name]


def _speculation_table(accepted, tokenizer, plans, chosen, lengths, depths, prompts, seed) -> Table:
    """What `accepted` reports of each plan, task and length."""
    headers = ("plan", "task", "tokens", "drafted", "kept", "per round", "ms per token")
    table = Table(*(Column(header, no_wrap=True) for header in headers), box=None, padding=(0, 2, 0, 0))
    cells = [(n, t, x) for n in plans for t in chosen for x in lengths]
    for number, (name, task, tokens) in enumerate(cells):
        samples = task.samples(tokenizer, tokens, depths if task.has_depth else [None], prompts, seed)
        with waiting(f"continuing prompts, {number + 1} of {len(cells)} rows"):
            report = accepted(samples=samples, plan=plans[name])
        drafted = sum(report.drafted.values())
        ms = report.rounds_ms / max(1, report.tokens - report.prompts)
        table.add_row(
            name,
            task.name,
            str(tokens),
            str(drafted),
            f"{report.acceptance():.0%}",
            f"{report.tokens_per_round:.2f}",
            f"{ms:.2f}",
        )
    return table


def _table(rows) -> Table:
    """One line per plan, task and length; depths are averaged here, the CSV has them all."""
    headers = ["plan", "task", "tokens", "prompts", "exact", "log-probability per token"]
    headers += ["perplexity"] if any(row.task == "perplexity" for row in rows) else []
    table = Table(*(Column(header, no_wrap=True) for header in headers), box=None, padding=(0, 2, 0, 0))
    cells: dict[tuple, list] = {}
    for row in rows:
        cells.setdefault((", ".join(filter(None, (row.plan, row.compress))), row.task, row.length), []).append(row)
    for (plan, task, length), group in cells.items():
        count = len(group)
        exact = f"{sum(row.exact for row in group) / count:.0%}" if task != "perplexity" else "-"
        logprob = sum(row.logprob for row in group) / count  # RULER has none
        shown = "-" if math.isnan(logprob) else f"{logprob:.3f}"
        perplexity = f"{math.exp(-logprob):.3f}" if task == "perplexity" else "-"
        cells_of = (plan, task, str(length), str(sum(row.prompts for row in group)), exact, shown, perplexity)
        table.add_row(*cells_of[: len(headers)])
    return table
