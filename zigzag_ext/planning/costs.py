"""What a layer costs as retrieval and as streaming layer: KV bytes by geometry, milliseconds by a measured cost table.

A cost table is a dict, or a JSON file of one: milliseconds of a decode step per layer at some context lengths (ascending).

    {"context": [1024, 131072], "retrieval": [0.011, 0.214], "streaming": [0.006, 0.006], "other": 3.1}

"retrieval" and "streaming" hold per context one number for every layer, or a list with one number per layer. "other" (optional)
is what a step takes beside these layers: one number, or one per context. "mixed" (optional) is what plans of heads need: per
context a list of what a layer takes in which 1, 2 ... kv_heads - 1 heads retrieve. Between two contexts, numbers are
interpolated linearly.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .. import _C
from .kv_format import PLAIN, KvFormat
from .reading import located, read_json, shown

_REQUIRED = ("context", "retrieval", "streaming")
_OPTIONAL = ("other", "mixed")


def kv_costs(
    layers: int,
    kv_heads: int | Sequence[int],
    head_dim: int | Sequence[int],
    element_bytes: int,
    context: int,
    *,
    sink: int,
    window: int,
    rollback: int = 0,
    kv_format: KvFormat = PLAIN,
    ring_kv_format: KvFormat = PLAIN,
) -> tuple[list[int], list[int]]:
    """KV bytes of each layer for one sequence: as retrieval layer at `context` tokens, and as streaming layer.

    Args:
        kv_heads, head_dim: KV heads, and elements of each, one number or one per layer.
        element_bytes: of a key or value in the model's dtype.
        rollback: slots of a ring beyond sink + window.
        kv_format, ring_kv_format: of retrieval and of streaming layers; scales of quantised formats are counted.

    Returns:
        The bytes that `ZigzagCache.kv_bytes` reports: without what an allocator rounds up to whole pages.

    Raises:
        ValueError: a size is out of range, or `kv_heads` or `head_dim` has another number of layers.
    """
    heads, dims = per_layer("kv_heads", kv_heads, layers), per_layer("head_dim", head_dim, layers)
    formats = {"retrieval": kv_format, "streaming": ring_kv_format}
    slots = {kind: _C.cache_slots(kind, sink, window, context, rollback) for kind in formats}
    retrieval, streaming = (
        [_C.kv_bytes(slots[kind], n, dim, element_bytes, formats[kind]) for n, dim in zip(heads, dims, strict=True)]
        for kind in formats
    )
    return retrieval, streaming


def per_layer(name: str, value: int | Sequence[int], layers: int) -> list[int]:
    """One number for each layer. Raises ValueError for a list of another length."""
    numbers = [value] * layers if isinstance(value, int) else list(value)
    if len(numbers) != layers:
        raise ValueError(f"{name} must be one number or one per layer, {layers}, got {len(numbers)}")
    return numbers


def ms_costs(table: Mapping | str | os.PathLike, context: int, layers: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Milliseconds per token at `context`: [layers] as retrieval layers, [layers] as streaming layers, and beside the layers.

    Raises:
        ValueError: the table lacks an entry, an entry has the wrong shape or a negative number, or `context` lies outside it.
    """
    if not isinstance(table, Mapping):
        content = _read(Path(table))
        with located(str(table)):
            return ms_costs(content, context, layers)
    contexts = _contexts(table, context)

    def at_context(name, entry, columns):
        rows = _numbers(name, entry)
        if rows.ndim < 2:  # one number for all layers
            rows = np.broadcast_to(rows[..., None], (*rows.shape, columns))
        if rows.shape != (contexts.size, columns):
            raise ValueError(
                f"cost table: {name} must hold one number per context ({contexts.size}), or for each one per layer ({layers})"
            )
        return np.array([np.interp(context, contexts, column) for column in rows.T])

    other = table.get("other", 0.0)
    other = at_context("other", [other] * contexts.size if np.ndim(other) == 0 else other, 1)
    retrieval, streaming = (at_context(kind, table[kind], layers) for kind in ("retrieval", "streaming"))
    return retrieval, streaming, float(other[0])


def head_ms_costs(table: Mapping | str | os.PathLike, context: int, layers: int, kv_heads: int) -> tuple[np.ndarray, float]:
    """Milliseconds per token at `context`, [layers, kv_heads + 1] by the number of heads that retrieve, and beside the layers.

    Raises:
        ValueError: as `ms_costs`, or the table says nothing of layers with heads of both kinds.
    """
    if not isinstance(table, Mapping):
        content = _read(Path(table))
        with located(str(table)):
            return head_ms_costs(content, context, layers, kv_heads)
    retrieval, streaming, other = ms_costs(table, context, layers)
    mixed = np.empty((0,))
    if kv_heads > 1:
        if "mixed" not in table:
            raise ValueError("cost table: missing mixed, the time of layers with heads of both kinds: level='head' needs it")
        contexts, rows = _contexts(table, context), _numbers("mixed", table["mixed"])
        if rows.shape != (contexts.size, kv_heads - 1):
            raise ValueError(
                f"cost table: mixed must hold per context ({contexts.size}) a list of {kv_heads - 1}, "
                f"one number for each count of retrieval heads from 1 to {kv_heads - 1}"
            )
        mixed = np.array([np.interp(context, contexts, column) for column in rows.T])
    return np.column_stack([streaming, np.broadcast_to(mixed, (layers, mixed.size)), retrieval]), other


def _contexts(table: Mapping, context: int) -> np.ndarray:
    """The contexts of a cost table, checked, with the names of its entries."""
    if missing := [name for name in _REQUIRED if name not in table]:
        optional = " and ".join(_OPTIONAL)
        raise ValueError(f"cost table: missing {', '.join(missing)}; needed: {', '.join(_REQUIRED)}, and optionally {optional}")
    if unknown := sorted(table.keys() - {*_REQUIRED, *_OPTIONAL}):
        raise ValueError(f"cost table: unknown {', '.join(unknown)}; known: {', '.join(_REQUIRED + _OPTIONAL)}")
    contexts = _numbers("context", table["context"])
    if contexts.ndim != 1 or not contexts.size or (np.diff(contexts) <= 0).any():
        raise ValueError(f"cost table: context must be a list of ascending token counts, got {shown(table['context'])}")
    if not contexts[0] <= context <= contexts[-1]:
        raise ValueError(f"cost table: it covers contexts {contexts[0]:g} to {contexts[-1]:g}, not {context}")
    return contexts


def _read(path: Path) -> Mapping:
    table = read_json(path, "a cost table")
    if not isinstance(table, dict):
        raise ValueError(f"{path} is not a cost table: it must be a JSON object")
    return table


def _numbers(name: str, entry) -> np.ndarray:
    try:
        numbers = np.asarray(entry)
    except ValueError as error:
        raise ValueError(f"cost table: {name} is ragged: {error}") from error
    if numbers.dtype.kind not in "fiu":
        raise ValueError(f"cost table: {name} must hold numbers, got {shown(entry)}")
    if not (np.isfinite(numbers) & (numbers >= 0)).all():
        raise ValueError(f"cost table: {name} must be finite and at least 0, got {shown(entry)}")
    return numbers.astype(np.float64)
