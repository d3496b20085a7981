"""What scores and plans are made for: a model, its geometry, and the method that scored its heads.

An origin is a dict that holds what is known of `FIELDS`: "model" (name or path, as it was given to from_pretrained), "method" (of
`identify`), "layers", "kv_heads", "head_dim", "query_heads" (per layer). Arrays of scores have it as attribute and keep it in
their files (`scores.py`); `solve` hands it on to its plan, which keeps it in its provenance, under "origin". `enable` and
`ZigzagCache` refuse a plan whose origin has other layers, KV heads or head_dim than the model; what is not known fits any.
"""

from collections.abc import Mapping
from pathlib import PurePath

from .layers import field_of, full_layers, geometries, text_config

FIELDS = {"model": str, "method": str, "layers": int, "kv_heads": int, "head_dim": int, "query_heads": int}
_GEOMETRY = ("layers", "kv_heads", "head_dim")
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def known(value) -> dict:
    """The fields of an origin in any JSON value; what else it holds is left out."""
    given = value if isinstance(value, Mapping) else {}
    return {name: given[name] for name, kind in FIELDS.items() if type(given.get(name)) is kind}


def origin_of(config) -> dict:
    """Name and geometry of a model, from its config: of the full-attention layers, among which plans choose, if it has any.

    Layers that read the KV cache of another one (`kv_sources`) are not counted.

    Args:
        config: a config of transformers, a dict as in config.json, or anything with those attributes. Of a composite model the
            text decoder's counts.

    Raises:
        TypeError: `config` is a name or path.
        ValueError: a size is missing, or not one positive number for all full-attention layers; the message names the field.
    """
    sizes = geometries(config)
    chosen = [sizes[layer] for layer in full_layers(config)] or list(sizes)
    if len({(of.kv_heads, of.head_dim) for of in chosen}) > 1:
        raise ValueError(
            f"the full-attention layers must be alike, they have {sorted({of.kv_heads for of in chosen})} KV heads and head_dim "
            f"{sorted({of.head_dim for of in chosen})}"
        )
    name = field_of(config, "_name_or_path") or field_of(text_config(config), "_name_or_path")
    return {**({"model": str(name)} if name else {}), "layers": len(sizes), **chosen[0]._asdict()}


def element_bytes_of(config) -> int:
    """Bytes of an element in the dtype that the config names; 2 where it names none that a cache can have."""
    for place in (text_config(config), config):
        dtype = field_of(place, "dtype") or (place.get("torch_dtype") if isinstance(place, Mapping) else None)
        if dtype is not None:
            return _BYTES.get(str(dtype).removeprefix("torch."), 2)
    return 2


def check_geometry(origin: dict, model: dict, what: str) -> None:
    """Raises ValueError with both geometries unless `model` has that of `origin`, as far as it is known."""
    if any(origin.get(name, model[name]) != model[name] for name in _GEOMETRY):
        raise ValueError(f"{what} {_as_text(origin)}; the model has {_as_text(model)}")


def other_model(origin: dict, model: dict) -> bool:
    """Whether two models are known to have different names. A hub name and a folder of that name are one model."""
    names = {PurePath(of.get("model", "")).name for of in (origin, model)}
    return "" not in names and len(names) > 1


def _as_text(origin: dict) -> str:
    """A geometry in words: 32 layers x 8 KV heads of head_dim 128 (the model's name)."""
    parts = [f"{origin[name]} {unit}" for name, unit in (("layers", "layers"), ("kv_heads", "KV heads")) if name in origin]
    parts = [" x ".join(parts), *([f"of head_dim {origin['head_dim']}"] if "head_dim" in origin else [])]
    return " ".join([*filter(None, parts), *([f"({origin['model']})"] if "model" in origin else [])])
