"""What a ZigzagCache holds as one file, and back in another process: `ZigzagCache.save` and `ZigzagCache.load`.

A safetensors file. Its metadata has one entry, "zigzag_cache", JSON: plan, model (`planning/origin.py`), the arguments of the
cache, and what the host knows of it. Tensors: "seq_lens" [1 or 1 + layers, batch] int32 and "tokens" [batch, columns] int32
(`HeldTokens`); for every store of a layer, as "<layer>.<store>.<buffer>", the slots that hold tokens, one row behind the other:
[slots of all rows, heads, width], without width for scales; "key_offset" if keys are smoothed; "<layer>.queries", of which
"<layer>.valid" count, that a choice of tokens still needs; "<layer>.conv.<number>" and "<layer>.recurrent.<number>" [batch, ...],
states in the model's own shapes, as they are (version 2). Rows of a retrieval layer have a slot per token; rings of full rows
are there whole.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..attention.store import MAX_TOKENS, LayerStore, in_normal_mode
from ..planning.origin import check_geometry, known, origin_of, other_model
from ..planning.plan import Plan
from ..planning.reading import parse_json, shown
from . import compression
from .compression.observed import Observed
from .rows import Rows
from .state import locked
from .states import StateLayer
from .tensor_file import TensorFile, open_tensors, write_tensors
from .tokens import raise_mask_error

if TYPE_CHECKING:
    from .cache import ZigzagCache

VERSION = 2  # 1 is written for caches without states, which older ones can read
_ENTRY = "zigzag_cache"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


@locked
@in_normal_mode
def save(self: "ZigzagCache", path: str | os.PathLike) -> None:
    """Writes what the cache holds, plan included, to a file for `load`: whole or not at all. Waits for the device.

    The file takes the bytes of the tokens held, rings and what was left out of a prompt included as they are, and no room to
    grow; one row of one layer at a time is copied to the host.

    Raises:
        ValueError: nothing is held, or images were read; the cache holds some of the heads only (tensor parallelism); or it
            compresses prompts by a method that is not this package's. RuntimeError: it is marked as not whole. OSError: as the
            system says; the file is then what it was.

    Example:
        >>> cache.save("book.cache")
        >>> cache = zz.ZigzagCache.load("book.cache", model)  # in another process, with the same model
    """
    state = self.state
    state.check()
    if not state.columns:
        raise ValueError("the ZigzagCache holds no tokens: there is nothing to save")
    if state.tokens.images_end:
        raise ValueError("the ZigzagCache has read images, which ids do not tell apart in another process: it cannot be saved")
    if state.tokens.fault is not None:
        raise_mask_error(int(state.tokens.fault))
    plan, model, sizes = state.made_for
    for layer in self.attention_layers:
        planned = sizes[layer.index]
        if (kv_heads := layer.stores[0].geometry[1]) != planned.kv_heads:
            raise ValueError(f"a cache that holds {kv_heads} of {planned.kv_heads} KV heads (tensor parallelism) cannot be saved")
    lengths = state.lengths_on(self.attention_layers[0].device)
    parts = {"seq_lens": [torch.stack(lengths)], "tokens": [state.tokens.ids[:, : state.columns]]}
    parts |= {f"{layer}.queries": [each.q] for layer, each in state.observed.items()}
    parts |= {f"{layer}.valid": [each.valid.int()] for layer, each in state.observed.items()}
    counts = torch.stack(lengths).tolist()
    for name, store in _named_stores(self):
        slots = _slots(store, counts)
        parts |= {f"{name}.{part}": list(_held(buffer, slots)) for part, buffer in store.buffers.items()}
        parts |= {} if store.key_offset is None else {f"{name}.key_offset": [store.key_offset]}
    parts |= {f"{states.index}.{name}": [tensor] for states in self.states for name, tensor in states.tensors.items()}
    write_tensors(path, parts, {_ENTRY: json.dumps(_host_state(self, plan, model))})


def _host_state(cache: "ZigzagCache", plan: Plan, model: dict) -> dict:
    state = cache.state
    rows = {field.name: getattr(state.rows, field.name).tolist() for field in dataclasses.fields(Rows)}
    states = {str(each.index): {name: str(t.dtype)[6:] for name, t in each.tensors.items()} for each in cache.states}
    with_states = {"version": VERSION, "states": states} if states else {"version": 1}
    return with_states | {
        "plan": plan.as_json(), "model": model, "dtype": str(cache.stores[0].dtype).removeprefix("torch."),
        "head_dim": cache.stores[0].geometry[2], "max_len": state.max_len, "rollback": cache.rollback,
        "compression": _method_as_json(state.compression), "compressed": state.compressed, "prompt_end": state.prompt_end,
        "rows": rows, "left_out": state.left_out.tolist(),
        "query_scales": {str(layer): float(each.scale) for layer, each in state.observed.items()},
    }  # fmt: skip


@in_normal_mode
def load(cls, path: str | os.PathLike, model) -> "ZigzagCache":
    """The cache that `save` wrote, for the same model: it goes on where that one stopped, with the same tokens.

    Args:
        model: the model that is to use it, whose layers say on which devices keys and values live; or its config: on the CPU.

    The plan, the formats, `max_len`, `rollback` and `compress` are those of the cache that was saved. Weights are not compared,
    only name and geometry: of a model that was trained further under its old name the answers would be wrong.

    Raises:
        FileNotFoundError, another OSError: there is no file, or it cannot be read.
        ValueError: it is no cache file or a damaged one, comes from a newer version, or is of a model of another name or
            geometry.
        MemoryError: no memory for what is held.
    """
    with open_tensors(path, "a cache file") as file:
        config = getattr(model, "config", model)
        content, found = _content_for(file, config), origin_of(config)
        cache = cls(
            config, Plan.from_json(content["plan"]), content["max_len"], content["rollback"],
            compress=_method_of(content["compression"]),
        )  # fmt: skip
        devices = _devices(model, len(cache.state.sources))[: len(cache.layers)]
        _restore(cache, file, content, devices, found)
        return cache


def check_file(path: str | os.PathLike, config) -> None:
    """Raises what `load` would raise of a file that is no cache file, or is not for models of this config."""
    with open_tensors(path, "a cache file") as file:
        _content_for(file, config)


def _content_for(file: TensorFile, config) -> dict:
    content, found = _content(file), origin_of(config)
    origin = known(content["model"])
    check_geometry(origin, found, "it holds keys of")
    if other_model(origin, found):
        raise ValueError(
            f"it holds keys of {shown(origin['model'])}, the model is {shown(found['model'])}: read the prompt again"
        )
    return content


def _content(file: TensorFile) -> dict:
    """The JSON of a file, with the fields and types that `_host_state` gives it."""
    if _ENTRY not in file.metadata:
        raise ValueError(f"its metadata has no entry {_ENTRY!r}: ZigzagCache.save did not write it")
    content = parse_json(file.metadata[_ENTRY])
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is not int or version < 1:
        raise ValueError(f"{_ENTRY} must be an object with a version, got {shown(content)}")
    if version > VERSION:
        raise ValueError(f"its version is {version}; this zigzag_ext reads up to {VERSION}: update it")
    content = {"states": {}} | content
    kinds = {
        "states": dict, "plan": dict, "model": dict, "dtype": str, "head_dim": int, "max_len": int | None, "rollback": int,
        "compression": dict | None, "compressed": bool, "prompt_end": int, "rows": dict, "left_out": list, "query_scales": dict,
    }  # fmt: skip
    for name, kind in kinds.items():
        if name not in content or not isinstance(content[name], kind):
            raise ValueError(f"{name} must be {getattr(kind, '__name__', kind)}, got {shown(content.get(name))}")
    if content["dtype"] not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {shown(content['dtype'])}")
    return content


def _restore(cache: "ZigzagCache", file: TensorFile, content: dict, devices: list[torch.device], model: dict) -> None:
    """Fills an empty cache. `content` and the shapes of all tensors are compared with each other before they are believed."""
    state, dtype, sizes = cache.state, _DTYPES[content["dtype"]], cache.state.made_for[2]
    if content["head_dim"] != sizes[0].head_dim:
        raise ValueError(f"head_dim is {content['head_dim']}, that of the model's first layer is {sizes[0].head_dim}")
    batch = (file.shape("seq_lens") + [0, 0])[1]
    if not 1 <= batch <= MAX_TOKENS:
        raise ValueError(f"seq_lens is {shown(file.shape('seq_lens'))}; [{state.num_lengths}, rows] is expected")
    rows = Rows(
        **{field.name: _numbers(f"rows.{field.name}", content["rows"], field.name, batch) for field in dataclasses.fields(Rows)}
    )
    lengths = file.read("seq_lens", (state.num_lengths, batch), torch.int32)
    ids = file.read("tokens", (batch, rows.columns), torch.int32)
    left_out = _left_out(content["left_out"], state.num_lengths, batch)
    counts = _checked_counts(cache, rows, lengths.numpy(), left_out)

    state.start(batch)
    for layer in cache.attention_layers:
        size, device = sizes[layer.index], devices[layer.index]
        like = torch.empty(batch, size.kv_heads, 0, size.head_dim, dtype=dtype, device=device)
        layer.lazy_initialization(like, like)
    for states in cache.states:
        states.restore(dict(_state_tensors(file, content["states"], states, batch, devices[states.index])))
    state.rows, state.left_out, state.capacity = rows, left_out, -1  # so that what a compressed prompt kept gets memory, too
    cache.ensure_capacity(rows)
    for (name, store), slots in zip(_named_stores(cache), counts, strict=True):
        _fill(store, file, name, slots)
    state.seq_lens[devices[0]] = lengths.to(devices[0])
    state.tokens.note(ids, None, batch, rows.columns, devices[0], 0)
    state.compressed, state.prompt_end = content["compressed"], content["prompt_end"]
    state.observed = dict(_queries(cache, file, content["query_scales"], (batch, model["query_heads"], model["head_dim"])))


def _checked_counts(cache: "ZigzagCache", rows: Rows, lengths: np.ndarray, left_out: np.ndarray) -> list[list[int]]:
    """By store, the slots of each row that hold tokens. Raises ValueError for numbers that no cache has."""
    if not 1 <= rows.columns <= MAX_TOKENS or (rows.held > rows.ends).any() or (rows.solid > rows.ends).any():
        raise ValueError("rows have no columns, or more tokens than columns")
    if (lengths < 0).any() or (lengths[0] > rows.held).any():
        raise ValueError("seq_lens are below 0 or more than the rows hold")
    if left_out[0].any() or (lengths != lengths[0] - left_out).any():
        raise ValueError("left_out is not what seq_lens lack")
    if (rows.prompt > rows.held).any() or (rows.sealed > rows.ends).any() or (left_out > rows.prompt).any():
        raise ValueError("rows have more of a compressed prompt than tokens, or have left out more than it had")
    return [_slots(store, lengths) for store in cache.stores]


def _fill(store: LayerStore, file: TensorFile, name: str, slots: list[int]) -> None:
    """Copies the tensors of one store to its buffers, a row at a time."""
    for part, buffer in store.buffers.items():
        file.check(f"{name}.{part}", (sum(slots), buffer.shape[1], *buffer.shape[3:]), buffer.dtype)
        for held, read in zip(_held(buffer, slots), file.rows(f"{name}.{part}", slots), strict=True):
            held.copy_(read)
    if store.key_offset is not None:
        store.key_offset.copy_(file.read(f"{name}.key_offset", store.key_offset.shape, store.dtype))


def _queries(cache: "ZigzagCache", file: TensorFile, scales: dict, shape: tuple[int, int, int]) -> Iterator[tuple]:
    """The last queries of a prompt that is still to be compressed, with their scales, by layer."""
    layers = {str(layer.index): layer for layer in cache.attention_layers if cache.state.compression and not layer.window}
    batch, heads, head_dim = shape
    for name, scale in scales.items():
        if name not in layers or not isinstance(scale, float) or not math.isfinite(scale):
            raise ValueError(
                f"query_scales must have a number per retrieval layer of a cache that compresses, got {shown(scales)}"
            )
        layer, found = layers[name], file.shape(f"{name}.queries")
        last = min(found[2] if len(found) == 4 else 0, cache.state.compression.observe)
        q = file.read(f"{name}.queries", (batch, heads, last, head_dim), layer.dtype)
        valid = file.read(f"{name}.valid", (batch,), torch.int32)
        if (valid < 0).any() or (valid > last).any():
            raise ValueError(f"{name}.valid must be 0 to {last} queries per row, got {shown(valid.tolist())}")
        yield layer.index, Observed(q.to(layer.device), valid.to(layer.device, torch.int64), scale)


def _state_tensors(file: TensorFile, names: dict, states: StateLayer, batch: int, device: torch.device) -> Iterator[tuple]:
    """The states of a layer by name, as `StateLayer.tensors` names them."""
    own = names.get(str(states.index))
    known = {f"{kind}.{number}" for kind in ("conv", "recurrent") for number in range(states.number_of_states)}
    if (
        not isinstance(own, dict)
        or not own
        or not own.keys() <= known
        or not all(isinstance(dtype, str) and dtype in _DTYPES for dtype in own.values())
    ):
        raise ValueError(f"states must name the dtypes of {', '.join(sorted(known))} of layer {states.index}, got {shown(own)}")
    for name, dtype in own.items():
        shape = file.shape(f"{states.index}.{name}")
        if len(shape) < 3 or shape[0] != batch:
            raise ValueError(f"{states.index}.{name} must have {batch} rows and at least 3 dimensions, got {shown(shape)}")
        yield name, file.read(f"{states.index}.{name}", shape, _DTYPES[dtype]).to(device)


def _left_out(content: list, num_lengths: int, batch: int) -> np.ndarray:
    """[num_lengths, batch] int64, see `CacheState`."""
    if len(content) != num_lengths:
        raise ValueError(f"left_out must have {num_lengths} lists, got {shown(content)}")
    return np.stack([_numbers("left_out", {"row": row}, "row", batch) for row in content])


def _numbers(what: str, content: dict, name: str, count: int) -> np.ndarray:
    """[count] int64 from a JSON list of numbers of tokens."""
    values = content.get(name)
    if not isinstance(values, list) or len(values) != count or not all(type(v) is int and 0 <= v <= MAX_TOKENS for v in values):
        raise ValueError(f"{what} must be {count} numbers of tokens, got {shown(values)}")
    return np.array(values, dtype=np.int64)


def _named_stores(cache: "ZigzagCache") -> Iterator[tuple[str, LayerStore]]:
    for layer in cache.attention_layers:
        yield from ((f"{layer.index}.{number}", store) for number, store in enumerate(layer.stores))


def _slots(store: LayerStore, lengths) -> list[int]:
    """Slots of each row that hold tokens, from lengths [1 or 1 + layers][batch]."""
    held = [int(length) for length in lengths[store.lengths]]
    return [min(length, store.ring_slots) for length in held] if store.window else held


def _held(buffer: Tensor, slots: list[int]) -> Iterator[Tensor]:
    """For each row [slots of the row, heads, width], or without width: views of what is held."""
    return (buffer[row, :, :count].transpose(0, 1) for row, count in enumerate(slots))


def _method_as_json(method) -> dict | None:
    if method is None:
        return None
    name = next((name for name, kind in compression.METHODS.items() if kind is type(method)), None)
    if name is None:
        raise ValueError(f"a cache that compresses by {type(method).__name__} cannot be saved: no file could say how")
    return {"method": name, **{field.name: getattr(method, field.name) for field in dataclasses.fields(method)}}


def _method_of(content: dict | None):
    if content is None:
        return None
    name = content.get("method")
    if name not in compression.METHODS:
        raise ValueError(f"compression.method must be one of {', '.join(compression.METHODS)}, got {shown(name)}")
    return compression.METHODS[name](**{key: value for key, value in content.items() if key != "method"})


def _devices(model, layers: int) -> list[torch.device]:
    """Where each layer of a model computes, the CPU for a config."""
    if not isinstance(model, nn.Module):
        return [torch.device("cpu")] * layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    stacks = (module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == layers)
    return [_device(module, model.device) for module in next(stacks, [decoder] * layers)]


def _device(module: nn.Module, default: torch.device) -> torch.device:
    """Where a module computes: accelerate keeps weights that it moves there from call to call elsewhere."""
    moved_to = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if moved_to is not None:
        return torch.device(moved_to)
    return next((parameter.device for parameter in module.parameters()), default)
