"""`Plan`: which layers retrieve and which stream, and the one file format that records it.

A plan file is JSON: `{"format": "zigzag-plan", "version": 1, "kinds": [...], "sink": 64, "window": 256, "provenance": {...}}`.
A plan with quantised caches has version 2 and `"kv_format": {"k": "int8", "v": "int4"}`, `"ring_kv_format": ...`.
"""

import json
import operator
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import _C
from .kv_format import PLAIN, KvFormat, parse_kv_format

FORMAT = "zigzag-plan"
VERSION = 2  # 1: without KV formats; still written for a plan that has none
_REQUIRED = {"format", "version", "kinds", "sink", "window"}
_FORMATS = ("kv_format", "ring_kv_format")
_KNOWN = _REQUIRED | {"provenance", *_FORMATS}


@dataclass(frozen=True, repr=False)
class Plan:
    """The kind of every layer of a model, with the cache size of its streaming layers. Immutable and hashable.

    Args:
        kinds: "retrieval" (keeps every token) or "streaming" (keeps `sink` + `window` tokens) for each layer, in order.
        sink: first tokens that streaming layers keep for ever, >= 0.
        window: last tokens that streaming layers keep, the newest one included, >= 1.
        kv_format: how retrieval layers cache keys and values: None (the model's dtype), "fp8", "int8", "int4", or a dict
            {"k": "int8", "v": "int4"}. One scale per token and head; 8-bit formats take about half of the bytes of a 16-bit
            dtype, int4 about a quarter.
        ring_kv_format: the same for streaming layers, whose few tokens rarely are worth it.
        provenance: where the plan comes from; any JSON object.

    Raises:
        TypeError: an argument has the wrong type. ValueError: it has a value that no plan can have.

    Example:
        >>> plan = Plan(["retrieval", "streaming", "streaming"], sink=64, window=256)
        >>> plan.retrieval_layers, plan.streaming_layers
        ((0,), (1, 2))
    """

    kinds: tuple[str, ...]
    sink: int = field(kw_only=True)
    window: int = field(kw_only=True)
    kv_format: KvFormat = field(default=PLAIN, kw_only=True)
    ring_kv_format: KvFormat = field(default=PLAIN, kw_only=True)
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True, hash=False)

    def __post_init__(self):
        kinds = _tuple_of_str(self.kinds)
        sink, window = token_count("sink", self.sink), token_count("window", self.window)
        _C.check_plan(kinds, sink, window)
        values = {"kinds": kinds, "sink": sink, "window": window, "provenance": _json_object(self.provenance)}
        values |= {name: parse_kv_format(name, getattr(self, name)) for name in _FORMATS}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    @property
    def retrieval_layers(self) -> tuple[int, ...]:
        """Indices of the retrieval layers, ascending."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if kind == "retrieval")

    @property
    def streaming_layers(self) -> tuple[int, ...]:
        """Indices of the streaming layers, ascending."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if kind == "streaming")

    @property
    def retrieval_ratio(self) -> float:
        """Share of the layers that are retrieval layers, 0 to 1."""
        return len(self.retrieval_layers) / self.num_layers

    @property
    def objective_value(self) -> float | None:
        """What the objective of `solve` optimised; None for a plan that is not from there."""
        return self.provenance.get("objective_value")

    @property
    def retained_score(self) -> float | None:
        """Share of the summed head scores that lies in retrieval layers; None for a plan that is not from `solve`."""
        return self.provenance.get("retained_score")

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan file at `path`: whole or not at all, replacing an older one."""
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} to save a plan in")
        formats = {name: getattr(self, name)._asdict() for name in _FORMATS if getattr(self, name) != PLAIN}
        version = VERSION if formats else 1
        content = {"format": FORMAT, "version": version, "kinds": self.kinds, "sink": self.sink, "window": self.window, **formats}
        content["provenance"] = self.provenance
        lines = [f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in content.items()]
        partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
        try:
            partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Reads a plan file written by `save`, or by hand.

        Raises:
            FileNotFoundError: there is no file at `path`.
            ValueError: it is not a plan file, comes from a newer version, or holds no valid plan; the message says which.
        """
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"there is no plan file at {path}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not a plan file: it is not JSON ({error})") from error
        try:
            _check_header(content)
            return cls(**{name: content[name] for name in content if name not in ("format", "version")})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a usable plan file: {error}") from error

    def summary(self) -> str:
        """A small table of text: the layers of each kind, sink, window, and what `solve` recorded."""
        rows = [
            ("layers", str(self.num_layers)),
            ("retrieval", f"{len(self.retrieval_layers)} ({self.retrieval_ratio:.0%}): {_ranges(self.retrieval_layers)}"),
            ("streaming", f"{len(self.streaming_layers)}: {_ranges(self.streaming_layers)}"),
            ("sink", f"{self.sink} tokens"),
            ("window", f"{self.window} tokens"),
            *((name.replace("_", " "), str(getattr(self, name))) for name in _FORMATS if getattr(self, name) != PLAIN),
        ]
        recorded = {key: value for key, value in self.provenance.items() if not isinstance(value, list)}
        rows += [(key.replace("_", " "), _as_text(value)) for key, value in recorded.items()]
        rows += _value_rows(self.kinds, self.provenance.get("layer_values"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def __repr__(self) -> str:
        pattern = "".join(kind[0].upper() for kind in self.kinds)
        counts = f"{len(self.retrieval_layers)} retrieval, {len(self.streaming_layers)} streaming"
        formats = "".join(f", {name} {getattr(self, name)}" for name in _FORMATS if getattr(self, name) != PLAIN)
        return f"<Plan {pattern}: {counts}, sink {self.sink}, window {self.window}{formats}>"


def _tuple_of_str(kinds) -> tuple[str, ...]:
    if isinstance(kinds, str) or not hasattr(kinds, "__iter__"):
        raise TypeError(f"kinds must be a list of 'retrieval' and 'streaming', one per layer, got {kinds!r}")
    kinds = tuple(kinds)
    for layer, kind in enumerate(kinds):
        if not isinstance(kind, str):
            raise TypeError(f"kinds must hold strings, got {kind!r} for layer {layer}")
    return kinds


def token_count(name: str, value) -> int:
    """`value` as an int. Raises TypeError for what is not an integer, bool included, ValueError beyond 64 bits."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer number of tokens, got {value!r}") from None
    if abs(value) >= 1 << 63:
        raise ValueError(f"{name} does not fit 64 bits: {value}")
    return value


def _json_object(provenance) -> dict[str, Any]:
    """A deep copy in JSON's own types, so that a plan equals itself after saving and loading."""
    if not isinstance(provenance, dict):
        raise TypeError(f"provenance must be a dict, got {provenance!r}")
    try:
        return json.loads(json.dumps(provenance, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"provenance must hold what JSON can hold: {error}") from error


def _check_header(content) -> None:
    """Raises ValueError unless `content` is an object of this format and version with the fields of a plan and no others."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'it is not a JSON object with "format": "{FORMAT}"')
    version = content.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"its version is {version!r}; supported: 1, {VERSION}")
    if version > VERSION:
        raise ValueError(f"it has version {version}, from a newer zigzag_ext; this one supports versions 1 and {VERSION}")
    if missing := sorted(_REQUIRED - content.keys()):
        raise ValueError(f"missing fields: {', '.join(missing)}")
    if unknown := sorted(content.keys() - _KNOWN):
        raise ValueError(f"unknown fields: {', '.join(unknown)}; known: {', '.join(sorted(_KNOWN))}")


def _as_text(value) -> str:
    """A recorded value on one line: numbers short, objects as name = value; lists of numbers as they are."""
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_as_text(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _value_rows(kinds: tuple[str, ...], values) -> list[tuple[str, str]]:
    """Eight layers a row, retrieval layers marked; none unless there is one number per layer."""
    if not isinstance(values, list) or len(values) != len(kinds) or not all(isinstance(value, int | float) for value in values):
        return []
    cells = [f"{value:>8.4g}{'*' if kind == 'retrieval' else ' '}" for kind, value in zip(kinds, values, strict=True)]
    rows = [(f"layers {i}-{min(i + 8, len(cells)) - 1}", "".join(cells[i : i + 8]).rstrip()) for i in range(0, len(cells), 8)]
    return [("layer values", "as the objective rates them; * retrieval"), *rows]


def _ranges(layers: tuple[int, ...]) -> str:
    """Layer indices as text, runs shortened: (0, 1, 2, 5) -> '0-2 5'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"
