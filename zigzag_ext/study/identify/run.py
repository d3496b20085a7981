"""The driver of every method: checks, resumes, reports progress, saves."""

import inspect
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

from ...planning.origin import origin_of
from ...planning.scores import Scores, save_scores
from ..evaluate.task import describe
from .data import VERSION
from .method import Method, Settings

_SAVE_SECONDS = 10.0  # between two saves of the state


def run(
    kind: type[Method],
    name: str,
    model: nn.Module,
    tokenizer,
    settings: dict,
    options: dict,
    output: str | os.PathLike | None,
    advance: Callable[[int, int], None],
) -> Scores:
    """Runs a method from its first step, or from where an interrupted run with the same arguments stopped."""
    known = list(inspect.signature(kind.__init__).parameters)[4:]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"method {name} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    defaults = {"tokens": kind.TOKENS, "prompts": kind.PROMPTS}
    settings = {key: defaults[key] if value is None else value for key, value in settings.items()}
    method = kind(model, tokenizer, Settings(**settings), **options)
    # Everything that decides the result, but for the weights beyond the first: a note, compared as text.
    first = float(next(model.parameters()).detach().double().sum())
    decides = {"method": name, "data": VERSION, **settings, **options, **describe(model), "first_weights": first}
    origin = json.dumps(decides, sort_keys=True)
    output = None if output is None else Path(output)
    if output is not None and not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.absolute().parent} to save scores in")
    partial = None if output is None else output.with_name(output.name + ".partial.npz")
    done = _restore(method, partial, origin)
    saved = time.monotonic()
    try:
        while done < method.steps:
            advance(done, method.steps)
            method.step(done)
            done += 1
            if time.monotonic() - saved > _SAVE_SECONDS:
                _save(method, partial, origin, done)
                saved = time.monotonic()
    finally:
        if done < method.steps:
            _save(method, partial, origin, done)
    advance(done, method.steps)
    scores = Scores(method.scores(), {"method": name, **origin_of(model.config)})
    if output is not None:
        save_scores(scores, output, sink=settings["sink"], window=settings["window"])
        partial.unlink(missing_ok=True)
    return scores


def _save(method: Method, partial: Path | None, origin: str, done: int) -> None:
    """Writes the state: whole or not at all."""
    if partial is None or not done:
        return
    scratch = partial.with_name(f".{os.getpid()}.{partial.name}")
    arrays = {name: value.detach().cpu().numpy() for name, value in method.state.items()}
    np.savez(scratch, origin=origin, done=done, **arrays)
    os.replace(scratch, partial)


def _restore(method: Method, partial: Path | None, origin: str) -> int:
    """Steps that an interrupted run has done; its state goes to the method."""
    if partial is None or not partial.exists():
        return 0
    try:
        with np.load(partial, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        same, done = str(content.pop("origin")) == origin, int(content.pop("done"))
        if same:
            for name, value in method.state.items():
                with torch.no_grad():
                    value.copy_(torch.from_numpy(content[name]))
    except (ValueError, KeyError, OSError, EOFError, RuntimeError, BadZipFile) as error:
        raise ValueError(f"{partial} is damaged: {error}; delete it to start again") from error
    if not same:
        raise ValueError(f"{partial} was left by a run with other arguments; delete it, or repeat that run to finish it")
    return done
