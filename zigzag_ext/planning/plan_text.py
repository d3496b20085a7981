"""What a plan says about itself in text."""

from typing import TYPE_CHECKING

from .kv_format import PLAIN
from .reading import one_line

if TYPE_CHECKING:
    from .plan import Plan

FORMAT_FIELDS = ("kv_format", "ring_kv_format")


def summary(plan: "Plan") -> str:
    """See `Plan.summary`."""
    mixed, native, state = plan.mixed_layers, plan.native_layers, plan.state_layers
    share = len(plan.retrieval_layers) / (len(plan.full_layers) or 1)
    sized = tuple(layer for layer, size in enumerate(plan.layer_sizes) if size and layer not in native)
    rows = [
        ("layers", f"{plan.num_layers}{': ' + counts_of(plan) if native or state else ''}"),
        ("retrieval", f"{len(plan.retrieval_layers)} ({share:.0%}): {ranges(plan.retrieval_layers)}"),
        ("streaming", f"{len(plan.streaming_layers)}: {ranges(plan.streaming_layers)}"),
        *([("mixed", f"{len(mixed)}: {ranges(mixed)}"), ("heads", f"{plan.retrieval_ratio:.1%} retrieve")] if mixed else []),
        *((name, f"{len(own)}: {ranges(own)}") for name, own in (("native", native), ("without keys", state)) if own),
        ("sink", f"{plan.sink} tokens"),
        ("window", f"{plan.window} tokens"),
        *((f"layer {layer}", "sink {}, window {}".format(*plan.size(layer))) for layer in sized),
        *((name.replace("_", " "), str(getattr(plan, name))) for name in FORMAT_FIELDS if getattr(plan, name) != PLAIN),
        *([("key smoothing", "yes")] if plan.key_smoothing else []),
    ]
    recorded = {key: value for key, value in plan.provenance.items() if not isinstance(value, list)}
    rows += [(one_line(key.replace("_", " "), 40), _as_text(value)) for key, value in recorded.items()]
    rows += _value_rows(plan.kinds, plan.full_layers, plan.provenance.get("layer_values"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def counts_of(plan: "Plan") -> str:
    """Of a plan with layers that it does not choose: "24 native windows of 1024, 6 full: 3 retrieve, 3 stream"."""
    windows = sorted({window for window in plan.native_windows if window})
    counts = {"retrieve": plan.retrieval_layers, "stream": plan.streaming_layers, "mix both": plan.mixed_layers}
    kinds = ", ".join(f"{len(layers)} {verb}" for verb, layers in counts.items() if layers or verb != "mix both")
    fixed = [f"{len(plan.state_layers)} without keys"] if plan.state_layers else []
    fixed += [f"{len(plan.native_layers)} native windows of {' and '.join(map(str, windows))}"] if windows else []
    return ", ".join([*fixed, f"{len(plan.full_layers)} full: {kinds}"])


def _as_text(value) -> str:
    """A recorded value on one line: numbers short, objects as name = value; lists of numbers as they are."""
    if isinstance(value, dict):
        return one_line(", ".join(f"{key} = {_as_text(inner)}" for key, inner in value.items()))
    return f"{value:.4g}" if isinstance(value, float) else one_line(str(value))


def _value_rows(kinds: tuple, layers: tuple[int, ...], values) -> list[tuple[str, str]]:
    """Eight of the full-attention `layers` a row, retrieval layers marked; none unless there is one number for each."""
    if not isinstance(values, list) or len(values) != len(layers) or not all(map(_is_number, values)):
        return []
    cells = [f"{value:>8.4g}{'*' if kinds[layer] == 'retrieval' else ' '}" for layer, value in zip(layers, values, strict=True)]
    rows = [(f"layers {ranges(layers[i : i + 8])}", "".join(cells[i : i + 8]).rstrip()) for i in range(0, len(cells), 8)]
    return [("layer values", "as the objective rates them; * retrieval"), *rows]


def _is_number(value) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e100  # beyond, an integer has no float and a cell no room


def ranges(layers: tuple[int, ...]) -> str:
    """Layer indices as text, runs shortened: (0, 1, 2, 5) -> '0-2 5'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) or "none"
