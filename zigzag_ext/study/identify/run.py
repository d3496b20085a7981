"""The driver of every method: checks, resumes, reports progress, saves."""

import hashlib
import inspect
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...planning.arrays import read_npz
from ...planning.origin import origin_of
from ...planning.scores import Scores, check_output, save_scores
from ...planning.writing import check_writable, is_stream, write
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
    partial = None if output is None or is_stream(output) else output.with_name(output.name + ".partial.npz")
    if output is not None:
        check_output(output)
    if partial is not None:
        check_writable(partial)
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
    if partial is not None:
        partial.unlink(missing_ok=True)
    return scores


def _save(method: Method, partial: Path | None, origin: str, done: int) -> None:
    if partial is None or not done:
        return
    arrays = {"origin": np.array(origin), "done": np.array(done)}
    arrays |= {name: value.detach().cpu().numpy() for name, value in method.state.items()}
    content = io.BytesIO()
    np.savez(content, digest=np.array(_digest(arrays)), **arrays)
    write(partial, content.getvalue())


def _restore(method: Method, partial: Path | None, origin: str) -> int:
    """Steps that an interrupted run has done; its state goes to the method, whole or not at all."""
    if partial is None or not partial.exists():
        return 0
    start_again = "delete it to start again"
    try:
        content = read_npz(partial, "the state of an interrupted run")
    except ValueError as error:
        raise ValueError(f"{partial} is damaged: {error}; {start_again}") from None
    if str(content.pop("digest", None)) != _digest(content):
        changed = "its checksum is not that of its content, as after damage or an edit by hand"
        raise ValueError(f"{partial} is damaged: {changed}; {start_again}")
    if str(content.pop("origin", None)) != origin:
        raise ValueError(f"{partial} was left by a run with other arguments; delete it, or repeat that run to finish it")
    done = content.pop("done", np.array(0))
    expected = {name: (tuple(value.shape), value.detach().numpy().dtype) for name, value in method.state.items()}
    found = {name: (value.shape, value.dtype) for name, value in content.items()}
    if found != expected or done.shape or done.dtype.kind != "i" or not 0 < done <= method.steps:
        arrays = ", ".join(f"{name} {list(shape)} {dtype}" for name, (shape, dtype) in expected.items())
        raise ValueError(f"{partial} is no state of this run: expected {arrays} after 1 to {method.steps} steps; {start_again}")
    for name, value in method.state.items():
        with torch.no_grad():
            value.copy_(torch.from_numpy(content[name].copy()))
    return int(done)


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """A checksum of names, types, shapes and numbers: against accidents and edits by hand, not against forgery."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype.str} {arrays[name].shape}\n".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
