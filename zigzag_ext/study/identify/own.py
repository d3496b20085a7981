"""Methods that live outside the package: a function, named as "package.module:function".

    def score(model, tokenizer, *, sink, window, seed):
        ...
        return scores  # [layers, kv_heads], numbers in [0, 1]

docs/compare.md has what it is given and what it has to return.
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable

import numpy as np
from torch import nn

from ...planning.native import native_windows
from ...planning.origin import origin_of
from ...planning.reading import one_line
from ...planning.scores import Scores, as_array, check_output, save_scores

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_ALWAYS = {"sink": 64, "window": 256, "seed": 0}


def load_function(name: str, **options) -> Callable:
    """The function that `name` means, in a module that Python finds from the current folder or where packages are.

    Raises:
        ValueError: the name has another form; the module cannot be imported, or has no such function; or the function does not
            take what it will be called with (`sink`, `window`, `seed` and `options`).
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"method {name!r} must be written package.module:function")
    module_name, _, path = name.partition(":")
    found = _import(module_name, name)
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"method {name!r}: {module_name} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"method {name!r} is a {type(found).__name__}, not a function")
    try:
        inspect.signature(found).bind("model", "tokenizer", **(_ALWAYS | options))
    except TypeError as error:
        called = ", ".join(["model", "tokenizer", *(f"{key}=" for key in _ALWAYS | options)])
        raise ValueError(f"method {name!r} cannot be called with ({called}): {error}") from None
    return found


def _import(module: str, name: str):
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python -m` does; a command has its own folder there
    try:
        importlib.invalidate_caches()
        return importlib.import_module(module)
    except Exception as error:  # a module of others may fail in any way
        raise ValueError(f"method {name!r} cannot be imported: {type(error).__name__}: {one_line(str(error))}") from error
    finally:
        sys.path.remove(here)


def source_of(function: Callable) -> str:
    """The text of the module that a function is in, to tell whether it has been edited; empty if there is none."""
    try:
        return inspect.getsource(inspect.getmodule(inspect.unwrap(function)))
    except (OSError, TypeError):
        return ""


def identify_own(
    name: str,
    model: nn.Module,
    tokenizer,
    settings: dict,
    options: dict,
    output: str | os.PathLike | None,
    advance: Callable[[int, int], None],
) -> Scores:
    """What the function that `name` means gives for `model`, checked, and saved to `output`.

    Raises ValueError that names the method and the fault; OSError before the function is called if `output` cannot be written.
    """
    given = {key: value for key, value in settings.items() if key in _ALWAYS or value is not None} | options
    function = load_function(name, **given)
    if output is not None:
        check_output(output)
    advance(0, 1)
    attention, training = model.config._attn_implementation, model.training
    try:
        found = function(model, tokenizer, **given)
    except Exception as error:
        raise ValueError(f"method {name!r} failed: {type(error).__name__}: {one_line(str(error))}") from error
    finally:
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        model.train(training)
    geometry = origin_of(model.config)
    shape = (native_windows(model.config).count(None), geometry["kv_heads"])
    scores = Scores(check_matrix(found, shape, name), {"method": name, **geometry})
    if output is not None:
        save_scores(scores, output, sink=settings["sink"], window=settings["window"])
    advance(1, 1)
    return scores


def check_matrix(found, shape: tuple[int, int], name: str) -> np.ndarray:
    """float64 `shape` from what a method returned. Raises ValueError for another shape, NaN, or what lies outside [0, 1]."""
    try:
        matrix = as_array(found)
    except ValueError as error:
        raise ValueError(f"method {name!r} returned no matrix: {one_line(str(error))}") from None
    if matrix.dtype.kind not in "fiub":
        raise ValueError(f"method {name!r} must return numbers, got {type(found).__name__} of {matrix.dtype}")
    if matrix.shape != shape:
        expected = f"[{shape[0]}, {shape[1]}], a row per full-attention layer and a column per KV head"
        raise ValueError(f"method {name!r} must return scores {expected}; got {list(matrix.shape)}")
    matrix = matrix.astype(np.float64)
    wrong = np.argwhere(~((matrix >= 0) & (matrix <= 1)))
    if len(wrong):
        layer, head = wrong[0]
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"method {name!r} must return numbers in [0, 1], got {matrix[layer, head]:g} at layer {layer}, KV head {head}{more}"
        )
    return matrix
