"""A comparison in its folder: what is there is taken, what is missing is made, and the tables are written anew."""

import hashlib
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from urllib.parse import quote

from torch import nn

from ...planning.native import native_windows, whole_plan
from ...planning.origin import origin_of
from ...planning.reading import read_json, shown
from ...planning.scores import load_scores
from ...planning.solve import solve
from ...planning.writing import write
from .. import evaluate
from ..evaluate.results import kinds_of
from ..evaluate.task import Task, describe
from ..identify import METHODS, identify
from ..identify.data import VERSION
from ..identify.own import load_function, source_of
from ..layer_times import machine_name, measure_costs
from .plans import Choice, choices
from .settings import FULL, Settings, Source, zeros_for
from .table import Line, Overlap, as_csv, line_of, overlaps

_WHAT = "the record of a comparison"
Advance = Callable[[str, int, int], None]


def compare(
    model: nn.Module,
    tokenizer,
    settings: Settings,
    folder: Path,
    advance: Advance = lambda what, done, total: None,
) -> tuple[list[Line], list[Overlap]]:
    """Scores `model` by every method, makes the plans, evaluates what no row is there of yet, and writes both tables.

    Args:
        folder: made if it is not there. An interrupted call is taken up by the same call; one with other ratios, tasks or
            methods adds to it.
        advance: called with what is done, steps done and steps in all.

    Raises:
        ValueError: `settings` do not fit the model; the folder holds a comparison of another model, or a damaged file; what
            `identify`, `solve` and the tasks raise. OSError: the folder cannot be written.
    """
    settings.check(model.config)
    for task, length in product(settings.tasks, settings.lengths):
        if isinstance(task, Task):  # a length that is too short for it is found out before anything is scored
            task.samples(tokenizer, length, settings.depths[:1] if task.has_depth else [None], 1, settings.seed)
    (folder / "scores").mkdir(parents=True, exist_ok=True)
    record = _open(folder / "run.json", model, settings)
    scores = {source.label: _scores(source, model, tokenizer, settings, folder, record, advance) for source in settings.sources}
    costs, ms_from = _costs(model, settings, folder, record, advance)
    chosen = choices(scores, settings, model.config, model.dtype.itemsize, costs)
    rows = _measure(model, tokenizer, chosen, settings, folder / "rows.csv", advance)
    kv_heads = origin_of(model.config)["kv_heads"]
    whole = _whole(model, settings, costs)
    lines = [line_of(choice, row, kv_heads, whole, ms_from) for choice, row in rows]
    common = overlaps(chosen, kv_heads)
    write(folder / "compare.csv", as_csv(Line, lines))
    write(folder / "overlap.csv", as_csv(Overlap, common))
    return lines, common


def read_record(path: Path) -> dict[str, dict]:
    """run.json: {"of": the model and the depths, "scores": {label: what they were made from}, "costs": what was measured}.

    Raises ValueError that names the file if it is damaged.
    """
    record = read_json(path, _WHAT)
    parts = ("of", "scores", "costs")
    if not isinstance(record, dict) or set(record) != set(parts) or not all(isinstance(record[part], dict) for part in parts):
        raise ValueError(f"{path} is not {_WHAT}: it must hold the objects {', '.join(parts)}")
    return record


def _open(path: Path, model: nn.Module, settings: Settings) -> dict[str, dict]:
    """The record at `path`, made if there is none. It holds what rows depend on and do not tell."""
    first = float(next(model.parameters()).detach().double().sum())
    of = {**describe(model), "first_weights": first, "depths": list(settings.depths)}
    if path.exists():
        record = read_record(path)
        if other := [
            f"{name} {shown(record['of'].get(name))}, not {value}"
            for name, value in of.items()
            if record["of"].get(name) != value
        ]:
            raise ValueError(f"{path.parent} holds a comparison of {'; '.join(other)}: give another folder")
        return record
    record = {"of": of, "scores": {}, "costs": {}}
    _note(path, record)
    return record


def _note(path: Path, record: dict) -> None:
    write(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def _scores(source: Source, model, tokenizer, settings: Settings, folder: Path, record: dict, advance: Advance):
    """[full-attention layers, kv_heads], or None for evenly spaced layers; found now unless they are there of these settings."""
    if source.path is not None:
        return load_scores(source.path)
    if source.method is None:
        return None
    options = {"seed": settings.seed, "sink": settings.sink, "window": settings.window}
    options |= {"tokens": settings.tokens, "prompts": settings.samples}
    made = {"method": source.method, **options}
    if source.method in METHODS:
        made["data"] = VERSION
    else:
        given = {name: value for name, value in (("tokens", settings.tokens), ("prompts", settings.samples)) if value is not None}
        made["source"] = hashlib.sha256(source_of(load_function(source.method, **given)).encode()).hexdigest()
    path = folder / "scores" / f"{quote(source.label, safe='')}.tsv"
    if not path.exists() or record["scores"].get(source.label) != made:
        record["scores"].pop(source.label, None)  # no note may stand beside scores that it is not of, whenever this ends
        _note(folder / "run.json", record)
        report = lambda done, total: advance(f"scores by {source.label}", done, total)  # noqa: E731
        identify(model, tokenizer, source.method, output=path, advance=report, **options)
        record["scores"][source.label] = made
        _note(folder / "run.json", record)
    return load_scores(path)


def _costs(model, settings: Settings, folder: Path, record: dict, advance: Advance) -> tuple[Path | None, str]:
    """The cost table's file and where its numbers are from."""
    if "ms" not in settings.budgets:
        return None, ""
    if settings.costs is not None:
        return settings.costs, f"table {settings.costs.name}"
    path, context = folder / "costs.json", settings.tokens_of(model.config)
    made = {"sink": settings.sink, "window": settings.window, "context": context}
    there = path.exists() and "machine" in record["costs"]
    if not there or {name: record["costs"].get(name) for name in made} != made:
        record["costs"] = {}
        _note(folder / "run.json", record)
        report = lambda done, total: advance("times of layers", done, total)  # noqa: E731
        table = measure_costs(model, settings.sink, settings.window, context, report)
        write(path, (json.dumps(table) + "\n").encode())
        record["costs"] = made | {"machine": machine_name(model.device)}
        _note(folder / "run.json", record)
    return path, f"measured: {record['costs']['machine']}"


def _whole(model, settings: Settings, costs: Path | None) -> dict:
    """Context, and KV bytes and milliseconds of full attention."""
    context, sizes = settings.tokens_of(model.config), {"sink": settings.sink, "window": settings.window}
    given = {"config": model.config, "element_bytes": model.dtype.itemsize, "context": context, "costs": costs}
    made = solve(zeros_for(model.config), 1.0, **given, **sizes).provenance
    return {"context": context, "kv_bytes": made["kv_bytes"], "ms": made.get("ms")}


def _measure(model, tokenizer, chosen: list[Choice], settings: Settings, path: Path, advance: Advance) -> list[tuple]:
    """(choice, row) for every choice, task and length, full attention (None) first. Plans that coincide are measured once."""
    done = {row.cell: row for row in evaluate.read(path)} if path.exists() else {}
    wanted = [(choice, task, length) for choice in [None, *chosen] for task in settings.tasks for length in settings.lengths]
    found = []
    for number, (choice, task, length) in enumerate(wanted):
        advance("plans x tasks", number, len(wanted))
        plan = None if choice is None else choice.plan
        prompts = settings.prompts * (len(settings.depths) if task.has_depth else 1)
        kinds = kinds_of(whole_plan(native_windows(model.config)) if plan is None else plan)
        sizes = (0, 0) if plan is None else (plan.sink, plan.window)
        cell = (*describe(model).values(), task.name, kinds, *sizes, "", length, None, settings.seed, prompts)
        if cell not in done:
            name = FULL if choice is None else f"{choice.method}, {choice.level}s-{100 * choice.ratio:g}%"
            options = {"lengths": [length], "depths": settings.depths, "prompts": settings.prompts, "seed": settings.seed}
            [row] = task(model, tokenizer, plan, **options, name=name, pooled=True)
            evaluate.append(path, [row])
            done[row.cell] = row
        found.append((choice, done[cell]))
    advance("plans x tasks", len(wanted), len(wanted))
    return found
