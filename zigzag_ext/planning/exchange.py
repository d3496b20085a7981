"""Plans in the formats of other projects: DuoAttention folders, per-layer window configurations, "0101" layer strings."""

import json
import os
import warnings
from pathlib import Path

from .plan import Plan, token_count
from .reading import located, read_json, shown
from .scores import DUO_SCORES, Scores, load_scores, save_scores
from .solve import solve
from .writing import write


def to_duo(plan: Plan, folder: str | os.PathLike, kv_heads: int) -> None:
    """Writes `plan` as a DuoAttention pattern: `full_attention_heads.tsv`, a one per retrieval head, and `config.json`.

    DuoAttention's own loader reads it, with `sink` and `window` as sink_size and recent_size. **Give its sparsify step exactly
    `1 - plan.retrieval_ratio` as sparsity** (also stored in config.json): its threshold is the interpolated quantile of the
    scores plus random noise below 1e-6, which at that sparsity falls between the ones and the zeros. A smaller sparsity puts it
    among the zeros, where the noise makes random heads retrieval heads; a larger one makes random heads of retrieval layers
    stream. While decoding, DuoAttention sees recent_size cached tokens and the new one; a window here counts the new one.

    Args:
        folder: made where it does not exist. kv_heads: KV heads of every layer, >= 1.

    Raises:
        ValueError: kv_heads < 1, or the plan is for another number of KV heads, or has native layers or layers of their own size.
            Nothing was written.

    Source: https://github.com/mit-han-lab/duo-attention (duo_attn/utils.py, load_attn_pattern and sparsify_attention_heads).
    """
    if kv_heads < 1:
        raise ValueError(f"kv_heads must be at least 1, got {kv_heads}")
    plan.require_one_size("a DuoAttention pattern")
    scores = [[float(head) for head in layer] for layer in plan.retrieval_heads(kv_heads)]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_scores(Scores(scores, plan.origin), folder / DUO_SCORES)
    config = {"sink_size": plan.sink, "recent_size": plan.window, "sparsity": 1 - plan.retrieval_ratio}
    write(folder / "config.json", (json.dumps(config) + "\n").encode())


def from_duo(folder: str | os.PathLike, *, threshold: float | None = None, sparsity: float | None = None) -> Plan:
    """The plan per KV head of a DuoAttention folder, with the sink and window of its config.json.

    Args:
        threshold: heads that score at least this retrieve.
        sparsity: share of the heads that stream: DuoAttention's quantile, see `solve(level="head")`.

    Without either, the folder must hold a plan: ones and zeros only.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: both arguments are given, or neither and there is another number; or config.json lacks the sizes.

    Source: https://github.com/mit-han-lab/duo-attention (duo_attn/utils.py).
    """
    folder = Path(folder)
    scores, config = load_scores(folder), folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{folder} has no config.json with sink_size and recent_size")
    sizes = read_json(config, "a JSON object with sink_size and recent_size")
    if not isinstance(sizes, dict) or not {"sink_size", "recent_size"} <= sizes.keys():
        raise ValueError(f"{config} must be a JSON object with sink_size and recent_size, got {shown(sizes)}")
    with located(str(config)):
        sink, window = token_count("sink_size", sizes["sink_size"]), token_count("recent_size", sizes["recent_size"])
        Plan(["streaming"], sink=sink, window=window)  # raises what no plan may have
    if threshold is not None or sparsity is not None:
        return solve(scores, level="head", threshold=threshold, sparsity=sparsity, sink=sink, window=window)
    for layer, row in enumerate(scores.tolist()):
        if set(row) - {0.0, 1.0}:
            raise ValueError(f"{folder}: layer {layer} is not all ones and zeros; give a threshold or sparsity, or use solve()")
    return Plan.from_heads(
        scores, sink=sink, window=window, provenance={"source": "DuoAttention folder", "origin": scores.origin}
    )


def to_layer_types(plan: Plan) -> dict:
    """Entries of a Hugging Face `config.json` that let an engine with per-layer windows run the plan without its sinks.

    Returns:
        {"layer_types": ["full_attention" or "sliding_attention", ...], "sliding_window": plan.window, "use_sliding_window": ...},
        as transformers (https://huggingface.co/docs/transformers/main_classes/configuration), vLLM and SGLang read them for
        families with sliding windows, Qwen2 for one. A window counts the newest token there as here. Native layers slide as
        streaming ones do.

    Raises:
        ValueError: the plan has mixed layers, layers without keys, or windows of several sizes.

    Warns:
        UserWarning: the plan has sink tokens. Such engines drop them, and quality beyond the window usually collapses without
        them (https://arxiv.org/abs/2309.17453).
    """
    plan.require_whole_layers("layer_types")
    plan.require_keys("layer_types")
    sizes = [plan.size(layer) for layer, kind in enumerate(plan.kinds) if kind != "retrieval"]
    windows = sorted({window for _, window in sizes}) or [plan.window]
    if len(windows) > 1:
        raise ValueError(f"layer_types have one window for all sliding layers, the plan has {' and '.join(map(str, windows))}")
    if sinks := [sink for sink, _ in sizes if sink]:
        warnings.warn(
            f"layer_types have no sink tokens: {len(sinks)} layers lose the first {max(sinks)} tokens and keep "
            f"only the last {windows[0]}; expect worse output than with this plan",
            stacklevel=2,
        )
    names = {"retrieval": "full_attention", "streaming": "sliding_attention", "native": "sliding_attention"}
    return {
        "layer_types": [names[kind] for kind in plan.kinds],
        "sliding_window": windows[0],
        "use_sliding_window": bool(sizes),
    }


def to_layer_string(plan: Plan) -> str:
    """One character per layer, "1" for streaming: `layer_type` of LongCat's `streaming_sparse_attention` configuration.

    Raises ValueError for mixed layers, native ones, or sizes of their own. Source: LoZA, https://arxiv.org/abs/2512.23966.
    """
    plan.require_whole_layers("a layer string")
    plan.require_one_size("a layer string")
    return "".join("1" if kind == "streaming" else "0" for kind in plan.kinds)


def from_layer_string(layers: str, *, sink: int, window: int) -> Plan:
    """The plan of a layer string: "1" streams, "0" retrieves.

    Raises:
        ValueError: it is empty or holds another character.

    Example:
        >>> from_layer_string("0110", sink=4, window=64).retrieval_layers
        (0, 3)
    """
    if unknown := sorted(set(layers) - set("01")):
        raise ValueError(f"a layer string holds 0 (retrieval) and 1 (streaming) only, got {unknown[0]!r}")
    kinds = ["streaming" if layer == "1" else "retrieval" for layer in layers]
    return Plan(kinds, sink=sink, window=window, provenance={"source": "layer string"})
