"""What a config alone tells: whether `enable` serves its models and why not, which layers are native, what the caches take."""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from .. import _C
from ..planning.layers import geometries, kv_sources
from ..planning.native import native_windows, whole_plan
from ..planning.plan_text import counts_of, ranges
from .attention import NAME
from .cache_argument import cache_parameter
from .families import check_family, images_refused
from .own_config import set_implementation

CONTEXTS = {"32K": 1 << 15, "128K": 1 << 17, "1M": 1 << 20}  # tokens


@dataclass(frozen=True)
class Served:
    """refusal: why `enable` raises, or None.

    windows: see `native_windows`; empty where the config names no layers. text_only: why prompts with images raise, or None.
    """

    refusal: str | None
    windows: tuple[int | None, ...]
    text_only: str | None = None


def served(config) -> Served:
    """Of a causal language model of this config, or an image-text model, built without memory for weights."""
    try:
        windows = native_windows(config)
    except (AttributeError, TypeError, ValueError):
        windows = ()
    refusal = _refusal(config)
    if refusal:
        return Served(refusal, windows)
    return Served(None, windows, images_refused(config))


def auto_class(config):
    """What makes a model of this config: AutoModelForCausalLM, or AutoModelForImageTextToText for one that only that knows."""
    known = [auto for auto in (AutoModelForCausalLM, AutoModelForImageTextToText) if type(config) in auto._model_mapping]
    return known[0] if known else AutoModelForCausalLM


def _refusal(config) -> str | None:
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(config)
    except Exception as error:  # whatever a family's constructor raises
        return f"its config makes no model ({type(error).__name__})"
    try:
        check_family(model)
    except ValueError as error:
        return str(error).partition(" is not supported by zigzag attention: ")[2]
    try:
        cache_parameter(model)
    except RuntimeError:
        return "its forward has no parameter for a KV cache"
    try:
        set_implementation(model, NAME)
    except RuntimeError:
        return "it does not take its attention from transformers' AttentionInterface"
    return None


def kv_table(config, element_bytes: int = 2, sink: int = 64, window: int = 256) -> dict[str, tuple[int, int]]:
    """KV bytes of one sequence at `CONTEXTS`: of the model as it is, and if the later half of its full layers streams."""
    windows = native_windows(config)
    full = [layer for layer, own in enumerate(windows) if own is None]
    streaming = set(full[len(full) // 2 :])
    sizes: dict[str, tuple[int, int]] = {}
    for name, context in CONTEXTS.items():
        both = [0, 0]
        for layer, (own, size) in enumerate(zip(windows, geometries(config), strict=True)):
            held = [context if own is None else min(own, context)] * 2  # 0 without keys
            if layer in streaming:
                held[1] = min(sink + window, context)
            for way, tokens in enumerate(held):
                both[way] += _C.kv_bytes(tokens, size.kv_heads, size.head_dim, element_bytes)
        sizes[name] = both[0], both[1]
    return sizes


def report(config) -> list[tuple[str, str]]:
    """Rows of text for `zigzag info MODEL`."""
    found = served(config)
    limit = found.text_only and f"text; {found.text_only}"
    served_as = f"no: {found.refusal}" if found.refusal else limit or "yes"
    rows = [("family", config.model_type), ("served", served_as)]
    if found.windows:
        plan = whole_plan(found.windows)
        some = len(plan.full_layers) < plan.num_layers
        rows += [("layers", counts_of(plan) if some else f"{plan.num_layers}, all with full attention")]
        rows += [("a plan may choose", ranges(plan.full_layers))]
        if shared := len(kv_sources(config)) - plan.num_layers:
            rows += [("shared KV caches", f"the last {shared} layers read those of earlier ones, and go by their kinds")]
    if not found.refusal:
        rows += [
            (f"KV bytes at {name}", f"{full:,} as it is, {half:,} with the half of its full layers streaming (64 + 256)")
            for name, (full, half) in kv_table(config).items()
        ]
    return rows
