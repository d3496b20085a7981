"""Layers that a model's own config fixes, and no plan chooses: sliding windows, whose rings are exact, and those without keys."""

from collections.abc import Sequence

from .layers import EMPTY, SLIDING, STATES, field_of, kv_sources, layer_kinds, text_config
from .origin import check_geometry, origin_of
from .plan import Plan
from .plan_text import ranges


def native_windows(config) -> tuple[int | None, ...]:
    """The window of each layer that has one of its own, in tokens, the newest one included; None: the layer sees every token; 0:
    it has no attention, and so no keys (linear attention, recurrence, convolution, or no mixing of tokens at all).

    Of the layers that have keys of their own: last ones that read the KV cache of an earlier layer do as that one (`kv_sources`).

    Args:
        config: of a model of transformers, or of one with a text decoder inside; or a dict as in config.json, whose layers must
            all be alike or named by `layer_types` or `layers_block_type`.

    A query at position q then sees positions above q - window, as in transformers' `sliding_window_overlay`. What a config says
    is compared with the mask that the model asks for, in every forward.

    Raises:
        ValueError: a layer slides and `config.sliding_window` is no number of tokens.

    Example:
        >>> from types import SimpleNamespace
        >>> native_windows(SimpleNamespace(num_hidden_layers=2, sliding_window=64, layer_types=[SLIDING, "full_attention"]))
        (64, None)
    """
    config = text_config(config)
    window, kinds = field_of(config, "sliding_window"), layer_kinds(config)
    if kinds is None:
        slides = window is not None and field_of(config, "use_sliding_window") is not False
        kinds = [SLIDING if slides else None] * field_of(config, "num_hidden_layers")
    if SLIDING in kinds and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"config.sliding_window must be a number of tokens, as layers slide; got {window!r}")
    fixed = dict.fromkeys((*STATES, *EMPTY), 0) | {SLIDING: window}
    return tuple(fixed.get(kind) for kind in kinds[: len(set(kv_sources(config)))])


def check_native(plan: Plan, windows: Sequence[int | None]) -> None:
    """Raises ValueError unless `plan` names the layers of a model with these `native_windows`, and their windows."""
    windows = tuple(windows)
    full = tuple(layer for layer, window in enumerate(windows) if window is None)
    layers = f"the model has {len(windows)}"
    if len(full) < len(windows):
        layers += (
            f", of which {ranges(full)} are full-attention layers and the others {_others(windows)}; "
            "plan.with_native(zz.native_windows(model.config)) makes such a plan from one over the full-attention layers"
        )
    if plan.num_layers != len(windows):
        raise ValueError(f"the plan has {plan.num_layers} layers, {layers}")
    for layer, pair in enumerate(zip(plan.native_windows, windows, strict=True)):
        if pair[0] != pair[1]:
            planned, own = map(_as_text, pair)
            raise ValueError(f"layer {layer} has {own} in the model, {planned} in the plan; layers: {layers}")


def _as_text(window: int | None) -> str:
    return "full attention" if window is None else f"a native window of {window}" if window else "no keys"


def _others(windows: Sequence[int | None]) -> str:
    """What layers without full attention are."""
    names = {"native windows": any(windows), "without keys": 0 in windows}
    return " or ".join(name for name, there in names.items() if there)


def whole_plan(windows: Sequence[int | None]) -> Plan:
    """The model as it is: full-attention layers keep every token, native windows are rings."""
    windows = tuple(windows)
    source = {"source": "full attention and native windows" if any(windows) else "full attention"}
    kinds = ["retrieval" if window is None else "native" if window else "state" for window in windows]
    return Plan(kinds, sink=0, window=1, layer_sizes=[(0, window) if window else None for window in windows], provenance=source)


def plan_for(config, plan: Plan | None) -> Plan:
    """`plan` checked against a text config, or the model as it is for None. Raises TypeError or ValueError."""
    if plan is None:
        return whole_plan(native_windows(config))
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a zigzag_ext.Plan (Plan.load(path) reads a plan file), got {plan!r}")
    check_geometry(plan.origin, origin_of(config), "the plan is for")
    check_native(plan, native_windows(config))
    return plan
