"""`Plan`: which layers retrieve and which stream, and the one file format that records it.

A plan file is JSON: `{"format": "zigzag-plan", "version": 1, "kinds": [...], "sink": 64, "window": 256, "provenance": {...}}`.
A plan with quantised caches has version 2 and `"kv_format": {"k": "int8", "v": "int4"}`, `"ring_kv_format": ...`.
A plan with layers of both kinds of heads has version 3; such a layer is a list of kinds, one per KV head.
A plan with key smoothing has version 4 and `"key_smoothing": true`.
A plan with native layers, or layers of their own size, has version 5 and `"layer_sizes"`: null or [sink, window] per layer.
A plan with layers that keep no keys ("state") has version 6.
What the plan was made for (model, method, geometry: `origin.py`) stands in the provenance, as "origin", in every version.
"""

import json
import operator
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from .. import _C
from .kv_format import PLAIN, KvFormat, parse_kv_format
from .origin import known
from .plan_text import FORMAT_FIELDS, counts_of, ranges, summary
from .reading import MAX_TEXT, located, one_line, parse_json, read_json, shown
from .writing import write

FORMAT = "zigzag-plan"
# The oldest that can hold a plan is written: 1, 2 with KV formats, 3 with mixed layers, 4 with key smoothing, 5 with layer sizes,
# 6 with layers that keep no keys.
VERSION = 6
KINDS = ("retrieval", "streaming", "native", "state")
_REQUIRED = {"format", "version", "kinds", "sink", "window"}
_KNOWN = _REQUIRED | {"provenance", "key_smoothing", "layer_sizes", *FORMAT_FIELDS}


@dataclass(frozen=True, repr=False)
class Plan:
    """The kind of every layer of a model, with the cache size of its streaming layers. Immutable and hashable.

    Args:
        kinds: for each layer, in order, "retrieval" (keeps every token), "streaming" (keeps `sink` + `window` tokens), "native"
            (the model itself gives the layer a sliding window, so that a ring of it loses nothing) or "state" (a layer of the
            model without keys: a recurrent or convolution state of fixed size, or nothing at all). A list of kinds, one per KV
            head, makes a *mixed* layer: two caches and two attention calls instead of one, as in DuoAttention
            (https://arxiv.org/abs/2410.10819). A list of one kind only becomes that kind.
        sink: first tokens that streaming layers and heads keep for ever, >= 0.
        window: last tokens that streaming layers and heads keep, the newest one included, >= 1.
        kv_format: how retrieval layers (and heads) cache their tokens: None (the model's dtype), "fp8", "int8", "int4", or a dict
            {"k": "int8", "v": "int4"}. One scale per token and head; 8-bit formats take about half of the bytes of a 16-bit
            dtype, int4 about a quarter.
        ring_kv_format: the same for streaming layers and heads, whose few tokens rarely are worth it.
        key_smoothing: subtract a constant from the keys of each head before they are quantised, in every layer whose keys are
            (`zigzag_ext.attention.smoothing`). Attention stays what it was; the codes of few bits get finer.
        layer_sizes: (sink, window) of layers that have another size than `sink` and `window`, None for others; empty where none
            has. A native layer needs one, with sink 0.
        provenance: where the plan comes from; any JSON object.

    A plan names every layer of its model, native ones too, with their windows, and those without keys: it is then checked against
    the model's config instead of being completed from it, and one file says what each layer keeps, for C++ as for Python.
    `with_native` makes such a plan from one over the full-attention layers, which is what `solve` chooses for.

    Raises:
        TypeError: an argument has the wrong type. ValueError: it has a value that no plan can have; or `key_smoothing` is asked
            for where no keys are quantised.

    Example:
        >>> plan = Plan(["retrieval", "streaming", "streaming"], sink=64, window=256)
        >>> plan.retrieval_layers, plan.streaming_layers
        ((0,), (1, 2))
    """

    kinds: tuple[str | tuple[str, ...], ...]
    sink: int = field(kw_only=True)
    window: int = field(kw_only=True)
    kv_format: KvFormat = field(default=PLAIN, kw_only=True)
    ring_kv_format: KvFormat = field(default=PLAIN, kw_only=True)
    key_smoothing: bool = field(default=False, kw_only=True)
    layer_sizes: tuple[tuple[int, int] | None, ...] = field(default=(), kw_only=True)
    provenance: dict[str, Any] = field(default_factory=dict, kw_only=True, hash=False)

    def __post_init__(self):
        kinds = _checked_kinds(self.kinds)
        sink, window = token_count("sink", self.sink), token_count("window", self.window)
        sizes = _checked_sizes(self.layer_sizes)
        _C.check_plan(kinds, sink, window, sizes)
        sizes = tuple(
            None if kind != "native" and own == (sink, window) else own for kind, own in zip(kinds, sizes, strict=False)
        )
        values = {"kinds": kinds, "sink": sink, "window": window, "layer_sizes": sizes if any(sizes) else ()}
        values["provenance"] = _json_object(self.provenance)
        values |= {name: parse_kv_format(name, getattr(self, name)) for name in FORMAT_FIELDS}
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_key_smoothing()

    def _check_key_smoothing(self) -> None:
        if not isinstance(self.key_smoothing, bool):
            raise TypeError(f"key_smoothing must be True or False, got {self.key_smoothing!r}")
        if self.key_smoothing and self.kv_format.k == self.ring_kv_format.k == "none":
            raise ValueError(
                "key_smoothing needs quantised keys: kv_format or ring_kv_format must be fp8, int8 or int4 for them; got "
                f"kv_format {self.kv_format}, ring_kv_format {self.ring_kv_format}"
            )

    @classmethod
    def from_heads(cls, retrieval, *, sink: int, window: int, provenance: dict[str, Any] | None = None) -> "Plan":
        """A plan per KV head.

        Args:
            retrieval: `[layers][kv_heads]` of bool, nested or an array: whether the head keeps every token.
            sink, window, provenance: as in `Plan`.

        Raises:
            ValueError: `retrieval` is empty or ragged. Else as `Plan`.

        Example:
            >>> Plan.from_heads([[True, True], [True, False]], sink=64, window=256).kinds
            ('retrieval', ('retrieval', 'streaming'))
        """
        rows = [[bool(head) for head in layer] for layer in retrieval]
        if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
            raise ValueError(f"retrieval must be [layers][kv_heads], all layers alike, got rows of {[len(row) for row in rows]}")
        kinds = [["retrieval" if head else "streaming" for head in row] for row in rows]
        return cls(kinds, sink=sink, window=window, provenance=provenance or {})

    def with_formats(self, kv_format=None, ring_kv_format=None, key_smoothing: bool | None = None) -> "Plan":
        """The plan with other formats; what is None stays ("none" is the model's dtype). Raises as `Plan` does."""
        given = {"kv_format": kv_format, "ring_kv_format": ring_kv_format, "key_smoothing": key_smoothing}
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    @property
    def retrieval_layers(self) -> tuple[int, ...]:
        """Indices of the layers all of whose heads retrieve, ascending."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if kind == "retrieval")

    @property
    def streaming_layers(self) -> tuple[int, ...]:
        """Indices of the layers all of whose heads stream, ascending."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if kind == "streaming")

    @property
    def mixed_layers(self) -> tuple[int, ...]:
        """Indices of the layers with heads of both kinds, ascending."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if not isinstance(kind, str))

    @property
    def native_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose window is the model's own, ascending."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if kind == "native")

    @property
    def state_layers(self) -> tuple[int, ...]:
        """Indices of the layers that keep no keys, ascending."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if kind == "state")

    @property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the other layers, ascending: full attention in the model, retrieval or streaming by choice."""
        return tuple(layer for layer, kind in enumerate(self.kinds) if kind not in ("native", "state"))

    @property
    def native_windows(self) -> tuple[int | None, ...]:
        """The window of each native layer in tokens, 0 for each layer without keys, None for every other layer."""
        fixed = ("native", "state")
        return tuple(self.size(layer)[1] if kind in fixed else None for layer, kind in enumerate(self.kinds))

    def size(self, layer: int) -> tuple[int, int]:
        """(sink, window) in tokens of the ring of `layer`; of its streaming heads if it is mixed; (0, 0) if it has none."""
        if self.kinds[layer] in ("retrieval", "state"):
            return 0, 0
        return (self.layer_sizes[layer] if self.layer_sizes else None) or (self.sink, self.window)

    def with_native(self, windows: Sequence[int | None]) -> "Plan":
        """The plan of a whole model, from this one over its full-attention layers.

        Args:
            windows: for each layer of the model its own window in tokens, the newest token included; 0: the layer keeps no
                keys; None: full attention, the next layer of this plan. `zigzag_ext.native_windows(config)` reads them.

        Raises:
            ValueError: this plan has native layers or ones without keys, or another number of layers than `windows` has Nones.

        Example:
            >>> Plan(["retrieval", "streaming"], sink=4, window=8).with_native([64, None, 64, None]).kinds
            ('native', 'retrieval', 'native', 'streaming')
        """
        windows = tuple(windows)
        full = tuple(layer for layer, window in enumerate(windows) if window is None)
        if fixed := tuple(layer for layer in range(self.num_layers) if layer not in self.full_layers):
            raise ValueError(f"the plan has native layers, or ones without keys, already: {ranges(fixed)}")
        if len(full) != self.num_layers:
            raise ValueError(
                f"the plan has {self.num_layers} layers, the model has {len(full)} full-attention layers: {ranges(full)}"
            )
        if len(full) == len(windows):
            return self
        own = dict(zip(full, zip(self.kinds, self.layer_sizes or (None,) * len(full), strict=True), strict=True))
        given = [("native", (0, window)) if window else ("state", None) for window in windows]
        layers = [own.get(layer, given[layer]) for layer in range(len(windows))]
        kinds, sizes = zip(*layers, strict=True)
        provenance = dict(self.provenance)
        if "layers" in self.origin:  # of the scores: a row per full-attention layer
            provenance["origin"] = provenance["origin"] | {"layers": len(windows)}
        return replace(self, kinds=kinds, layer_sizes=sizes, provenance=provenance)

    def require_one_size(self, use: str) -> None:
        """Raises ValueError if there are layers without keys or of their own size, native too, which `use` cannot express."""
        self.require_keys(use)
        if own := tuple(layer for layer, size in enumerate(self.layer_sizes) if size):
            raise ValueError(f"{use} needs one sink and window for all layers; layers {ranges(own)} have their own")

    def require_keys(self, use: str) -> None:
        """Raises ValueError if there are layers without keys, which `use` cannot express."""
        if self.state_layers:
            raise ValueError(f"{use} needs layers with attention; layers {ranges(self.state_layers)} keep no keys")

    @property
    def kv_heads(self) -> int | None:
        """KV heads per layer of the models that the plan fits; None without mixed layers, when it fits any number."""
        return next((len(self.kinds[layer]) for layer in self.mixed_layers), None)

    def retrieval_heads(self, kv_heads: int) -> tuple[tuple[bool, ...], ...]:
        """`[layers][kv_heads]`: which heads retrieve. Raises ValueError if the plan is for another number of KV heads."""
        self.check_kv_heads(kv_heads)
        rows = ((kind,) * kv_heads if isinstance(kind, str) else kind for kind in self.kinds)
        return tuple(tuple(kind == "retrieval" for kind in row) for row in rows)

    def check_kv_heads(self, kv_heads: int) -> None:
        """Raises ValueError if the plan is for another number of KV heads, by its mixed layers or its origin."""
        for planned in (self.kv_heads, self.origin.get("kv_heads")):
            if planned not in (None, kv_heads):
                raise ValueError(f"the plan is for layers of {planned} KV heads, these have {kv_heads}")

    def require_whole_layers(self, use: str) -> None:
        """Raises ValueError if there are mixed layers, which `use` cannot express."""
        if self.mixed_layers:
            raise ValueError(f"{use} needs layers of one kind; layers {ranges(self.mixed_layers)} mix heads of both kinds")

    @property
    def retrieval_ratio(self) -> float:
        """Share of the KV heads of full-attention layers that keep every token, 0 to 1; 1 where no layer is one.

        Without mixed layers that is the share of retrieval layers among them.
        """
        kinds = [self.kinds[layer] for layer in self.full_layers]
        shares = [kind == "retrieval" if isinstance(kind, str) else kind.count("retrieval") / len(kind) for kind in kinds]
        return sum(shares) / len(shares) if shares else 1.0

    @property
    def origin(self) -> dict[str, Any]:
        """What the plan was made for, as far as its provenance says: model, method, geometry. See `planning/origin.py`."""
        return known(self.provenance.get("origin"))

    @property
    def objective_value(self) -> float | None:
        """What the objective of `solve` optimised; None for a plan that is not from there."""
        return self.provenance.get("objective_value")

    @property
    def retained_score(self) -> float | None:
        """Share of the summed head scores that lies in retrieval layers; None for a plan that is not from `solve`."""
        return self.provenance.get("retained_score")

    def save(self, path: str | os.PathLike) -> None:
        """Writes the plan file at `path`: whole or not at all (`writing.write`). ValueError if it is too large to be read."""
        lines = [f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in self.as_json().items()]
        file = ("{\n" + ",\n".join(lines) + "\n}\n").encode()
        if len(file) > MAX_TEXT:
            raise ValueError(f"the plan takes {len(file)} bytes as a file; at most {MAX_TEXT} are read: shorten its provenance")
        write(path, file)

    def as_json(self) -> dict[str, Any]:
        """What a plan file holds, as JSON's types."""
        formats = {name: getattr(self, name)._asdict() for name in FORMAT_FIELDS if getattr(self, name) != PLAIN}
        needs = {6: self.state_layers, 5: self.layer_sizes, 4: self.key_smoothing, 3: self.mixed_layers, 2: formats}
        version = next((number for number, needed in needs.items() if needed), 1)
        formats |= {"key_smoothing": True} if self.key_smoothing else {}
        formats |= {"layer_sizes": self.layer_sizes} if self.layer_sizes else {}
        content = {"format": FORMAT, "version": version, "kinds": self.kinds, "sink": self.sink, "window": self.window, **formats}
        return content | {"provenance": self.provenance}

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Plan":
        """Reads a plan file written by `save`, or by hand.

        Raises:
            FileNotFoundError: there is no file at `path`.
            ValueError: it is not a plan file, comes from a newer version, or holds no valid plan; the message says which.
        """
        content = read_json(path, "a plan file")
        with located(f"{path} is not a usable plan file"):
            return cls.from_json(content)

    @classmethod
    def from_json(cls, content) -> "Plan":
        """The plan of what `as_json` gave, or of a plan file. Raises TypeError or ValueError."""
        _check_header(content)
        return cls(**{name: content[name] for name in content if name not in ("format", "version")})

    def summary(self) -> str:
        """A small table of text: the layers of each kind, sink, window, and what `solve` recorded."""
        return summary(self)

    def __repr__(self) -> str:
        letters = {"retrieval": "R", "streaming": "S", "native": "N", "state": "-"}
        pattern = "".join(letters[kind] if isinstance(kind, str) else "M" for kind in self.kinds)
        counts = f"{len(self.retrieval_layers)} retrieval, {len(self.streaming_layers)} streaming"
        counts += f", {len(self.mixed_layers)} mixed" if self.mixed_layers else ""
        counts = counts_of(self) if len(self.full_layers) < self.num_layers else counts
        formats = "".join(f", {name} {getattr(self, name)}" for name in FORMAT_FIELDS if getattr(self, name) != PLAIN)
        formats += ", key_smoothing" if self.key_smoothing else ""
        return f"<Plan {pattern}: {counts}, sink {self.sink}, window {self.window}{formats}>"


def _checked_kinds(kinds) -> tuple[str | tuple[str, ...], ...]:
    """Kinds per layer, a tuple of kinds for a mixed one. The core checks the names, and that mixed layers have as many heads."""
    if isinstance(kinds, str | bytes | Mapping | Set) or not hasattr(kinds, "__iter__"):
        raise TypeError(f"kinds must be a list of 'retrieval' and 'streaming', one per layer, got {shown(kinds)}")
    return tuple(_layer_kind(layer, kind) for layer, kind in enumerate(kinds))


def _layer_kind(layer: int, kind) -> str | tuple[str, ...]:
    if isinstance(kind, str):
        return kind
    if not isinstance(kind, list | tuple) or not all(isinstance(head, str) for head in kind):
        expected = "kinds must hold strings, or lists of them for the KV heads of a layer"
        raise TypeError(f"{expected}; got {shown(kind)} for layer {layer}")
    if not kind:
        raise ValueError(f"layer {layer} has no KV heads")
    return kind[0] if len(set(kind)) == 1 else tuple(kind)


def _checked_sizes(sizes) -> tuple[tuple[int, int] | None, ...]:
    if isinstance(sizes, str) or not hasattr(sizes, "__iter__"):
        raise TypeError(f"layer_sizes must be a list of (sink, window) or None, one per layer, got {shown(sizes)}")
    return tuple(None if size is None else _layer_size(layer, size) for layer, size in enumerate(sizes))


def _layer_size(layer: int, size) -> tuple[int, int]:
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise TypeError(f"layer_sizes must hold (sink, window) or None, got {shown(size)} for layer {layer}")
    return token_count(f"layer {layer}: sink", size[0]), token_count(f"layer {layer}: window", size[1])


def token_count(name: str, value) -> int:
    """As `integer`, of tokens."""
    return integer(name, value, "an integer number of tokens")


def integer(name: str, value, kind: str = "an integer") -> int:
    """`value` as an int. Raises TypeError for what is not an integer, bool included, ValueError beyond 64 bits."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {kind}, got {shown(value)}") from None
    if abs(value) >= 1 << 63:
        raise ValueError(f"{name} does not fit 64 bits: {shown(value)}")
    return value


def _json_object(provenance) -> dict[str, Any]:
    """A deep copy in JSON's own types, so that a plan equals itself after saving and loading."""
    if not isinstance(provenance, dict):
        raise TypeError(f"provenance must be a dict, got {shown(provenance)}")
    try:
        return parse_json(json.dumps(provenance, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"provenance must hold what JSON can hold: {error}") from error


def _check_header(content) -> None:
    """Raises ValueError unless `content` is an object of this format and version with the fields of a plan and no others."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'it is not a JSON object with "format": "{FORMAT}"')
    version = content.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise ValueError(f"its version is {shown(version)}; supported: 1 to {VERSION}")
    if version > VERSION:
        raise ValueError(f"it has version {shown(version)}, from a newer zigzag_ext; this one supports versions up to {VERSION}")
    if missing := sorted(_REQUIRED - content.keys()):
        raise ValueError(f"missing fields: {', '.join(missing)}")
    if unknown := sorted(content.keys() - _KNOWN):
        raise ValueError(f"unknown fields: {one_line(', '.join(unknown), 200)}; known: {', '.join(sorted(_KNOWN))}")
