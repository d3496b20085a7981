"""What a config says of single layers: heads and their size, and whose keys and values a layer attends."""

import os
from collections.abc import Mapping
from typing import NamedTuple

# What configs call their layers. A hybrid layer attends and has a state beside it.
SLIDING = "sliding_attention"
HYBRID = ("hybrid",)
FULL = ("full_attention", "attention", *HYBRID)
STATES = ("linear_attention", "mamba", "conv")  # recurrent and convolution layers: a state of fixed size
EMPTY = ("moe", "mlp")  # layers that keep nothing
# Gemma 4's names for what its full-attention layers have of their own, where its config has no `per_layer_config`.
_OF_FULL_LAYERS = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}


class Geometry(NamedTuple):
    """Of one layer; head_dim in elements."""

    query_heads: int
    kv_heads: int
    head_dim: int


def layer_kinds(config) -> list[str] | None:
    """What a config calls its layers, in order; None where it does not say. Raises TypeError as `text_config`."""
    config = text_config(config)
    return field_of(config, "layer_types") or field_of(config, "layers_block_type")


def kv_sources(config) -> tuple[int, ...]:
    """For each layer of a model the layer whose keys and values it attends: itself, or an earlier one whose cache it reads.

    The last `num_kv_shared_layers` layers have no keys of their own. Each reads those of the last layer of its kind before all of
    them, as in Gemma 3n and Gemma 4. So the layers that do have some are 0, 1, ... up to the first that reads.

    Args:
        config: as in `native_windows`.

    Raises:
        ValueError: no layer is left to read from, or none of the kind of a layer that reads.

    Example:
        >>> kv_sources({"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2})
        (0, 1, 0, 1)
    """
    config = text_config(config)
    kinds = layer_kinds(config) or [None] * size_of(config, "num_hidden_layers")
    shared = field_of(config, "num_kv_shared_layers") or 0
    if isinstance(shared, bool) or not isinstance(shared, int) or not 0 <= shared < len(kinds):
        raise ValueError(f"config.num_kv_shared_layers must be less than the {len(kinds)} layers, got {shared!r}")
    own = len(kinds) - shared
    last = {kind: layer for layer, kind in enumerate(kinds[:own])}
    for layer in range(own, len(kinds)):
        if kinds[layer] not in last:
            raise ValueError(f"layer {layer} shares the KV cache of an earlier '{kinds[layer]}' layer, and there is none")
    return (*range(own), *(last[kind] for kind in kinds[own:]))


def full_layers(config) -> list[int]:
    """The layers that have keys of their own, of all tokens."""
    kinds = layer_kinds(config)
    return [layer for layer in sorted(set(kv_sources(config))) if not kinds or kinds[layer] not in (SLIDING, *STATES, *EMPTY)]


def geometries(config) -> tuple[Geometry, ...]:
    """Of each layer that has keys of its own, see `kv_sources`.

    Raises:
        TypeError: `config` is a name or path.
        ValueError: a size is missing, or not one positive number for all heads of a layer; the message names the field.
    """
    text = text_config(config)
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    columns = zip(*(_of_layers(text, name) for name in names), strict=True)
    found = []
    for query_heads, kv_heads, head_dim, hidden in columns:
        query_heads = _checked("num_attention_heads", query_heads)
        kv_heads = 1 if field_of(text, "multi_query") else _checked("num_key_value_heads", kv_heads, query_heads)
        head_dim = _checked("head_dim", head_dim, 0) or _checked("hidden_size", hidden) // query_heads
        found.append(Geometry(query_heads, kv_heads, head_dim))
    return tuple(found)


def _of_layers(text, name: str) -> list:
    """What a text config says of `name` for each layer that has keys of its own."""
    layers, own = range(len(set(kv_sources(text)))), field_of(text, "per_layer_config")
    if own is not None and not isinstance(own, Mapping):
        return [field_of(own[layer], name) for layer in layers]
    common, kinds = field_of(text, name), field_of(text, "layer_types")
    if own:  # in config.json what differs from the rest, by layer
        by_layer = {int(layer): fields for layer, fields in own.items()}
        return [by_layer.get(layer, {}).get(name, common) for layer in layers]
    full = field_of(text, _OF_FULL_LAYERS[name]) if name in _OF_FULL_LAYERS else None
    if full is None or (name == "num_key_value_heads" and not field_of(text, "attention_k_eq_v")):
        return [common for _ in layers]
    return [common if kinds and kinds[layer] == SLIDING else full for layer in layers]


def text_config(config):
    if config is None or isinstance(config, str | os.PathLike):
        raise TypeError(f"config must be a model's config (model.config, or AutoConfig.from_pretrained), got {config!r}")
    if isinstance(config, Mapping):
        return config.get("text_config") or config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def field_of(config, name: str):
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def size_of(config, name: str) -> int:
    """Raises ValueError unless it is a positive number."""
    return _checked(name, field_of(config, name))


def _checked(name: str, value, default: int | None = None) -> int:
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.{name} is {value!r}; it must be one positive number for all layers")
    return value
