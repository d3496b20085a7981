"""Plans as entries of a model's config, which is how they travel to each process of vLLM, and what cannot be served there.

No vLLM is needed here. The entries stand on a command line as `--hf-overrides.KEY VALUE`, in characters that no shell changes,
because the words of `$(zigzag vllm-args plan.json)` are split at spaces, and quotes in them would be passed on.
"""

import re
from collections.abc import Mapping

from ..planning.exchange import to_layer_types
from ..planning.kv_format import PLAIN
from ..planning.native import plan_for
from ..planning.plan import Plan
from ..planning.reading import shown

ARCHITECTURES = {False: "ZigzagForCausalLM", True: "ZigzagMoEForCausalLM"}  # whether the model is a mixture of experts
KEY = "zigzag_plan"
_GEOMETRY = ("kv_heads", "head_dim")
_SERVED_KINDS = ("retrieval", "streaming", "native")
_LAYER = re.compile(rf"({'|'.join(_SERVED_KINDS)})(?::(\d+):(\d+))?", re.ASCII)


def overrides(plan: Plan, *, experts: bool = False) -> dict:
    """What `hf_overrides` of vLLM has to hold for `plan` to be run by this plugin.

    Args:
        experts: the model is a mixture of experts, for which vLLM needs another class.

    Returns:
        {"architectures": ["ZigzagForCausalLM"], "zigzag_plan": {"layers": [...], "sink": 64, "window": 256}}: a layer is its
        kind, with `:sink:window` where it has a size of its own; KV heads and head_dim stand beside them where the plan knows
        them.

    Raises:
        TypeError: `plan` is no Plan. ValueError: it has layers that the plugin does not serve, or quantised caches.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a zigzag_ext.Plan (Plan.load(path) reads a plan file), got {plan!r}")
    use = "zigzag_ext's plugin for vLLM"
    plan.require_whole_layers(use)
    plan.require_keys(use)
    if (plan.kv_format, plan.ring_kv_format) != (PLAIN, PLAIN):
        raise ValueError(
            f"{use} holds keys and values in the model's dtype, the plan wants kv_format {plan.kv_format}, ring_kv_format "
            f"{plan.ring_kv_format}: save it with both 'none' and without key smoothing"
        )
    sizes = plan.layer_sizes or (None,) * plan.num_layers
    layers = [f"{kind}:{size[0]}:{size[1]}" if size else kind for kind, size in zip(plan.kinds, sizes, strict=True)]
    geometry = {name: plan.origin[name] for name in _GEOMETRY if name in plan.origin}
    return {
        "architectures": [ARCHITECTURES[experts]],
        KEY: {"layers": layers, "sink": plan.sink, "window": plan.window, **geometry},
    }


def stock_overrides(plan: Plan) -> dict:
    """The same for a vLLM without this plugin: sliding windows, and no sinks. Raises and warns as `exchange.to_layer_types`."""
    return to_layer_types(plan)


def arguments(entries: Mapping) -> list[str]:
    """Arguments of `vllm serve` that set these `hf_overrides`; none has a character that a shell treats in a special way."""
    return [word for name, value in entries.items() for word in _argument(f"--hf-overrides.{name}", value)]


def _argument(name: str, value) -> list[str]:
    if isinstance(value, Mapping):
        return [word for key, inner in value.items() for word in _argument(f"{name}.{key}", inner)]
    if isinstance(value, list | tuple):
        return [f"{name}+", ",".join(value)]  # vLLM makes a list of texts of it
    return [name, str(value).lower() if isinstance(value, bool) else str(value)]


def plan_of(config) -> Plan:
    """The plan among the entries of a model's config, checked against what that config says of its layers.

    Raises:
        ValueError: there is none, or one that `overrides` does not write, or it is for another model.
    """
    entry = getattr(config, KEY, None)
    if not isinstance(entry, Mapping):
        raise ValueError(f"the config has no {KEY}: give vLLM the arguments that `zigzag vllm-args plan.json` prints")
    if unknown := sorted(entry.keys() - {"layers", "sink", "window", *_GEOMETRY}):
        raise ValueError(f"{KEY} has unknown entries: {shown(unknown)}")
    if missing := sorted({"layers", "sink", "window"} - entry.keys()):
        raise ValueError(f"{KEY} lacks {', '.join(missing)}")
    layers = entry["layers"] if isinstance(entry["layers"], list | tuple) else [entry["layers"]]
    parts = [_LAYER.fullmatch(layer) if isinstance(layer, str) else None for layer in layers]
    if None in parts:
        raise ValueError(
            f"{KEY}.layers must hold {', '.join(_SERVED_KINDS)}, or such a kind with :sink:window; layer {parts.index(None)} is "
            f"{shown(layers[parts.index(None)])}"
        )
    sizes = [(int(part[2]), int(part[3])) if part[2] else None for part in parts]
    origin = {name: entry[name] for name in _GEOMETRY if name in entry}
    plan = Plan(
        [part[1] for part in parts],
        sink=entry["sink"],
        window=entry["window"],
        layer_sizes=sizes if any(sizes) else (),
        provenance={"origin": origin},
    )
    return plan_for(config, plan)


def refusal(vllm_config) -> str | None:
    """Why this plugin does not serve a model under a vLLM configuration; None if it does.

    Each of these would drop sinks, or hold or compute something else than the plan says, without a word.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    experts = ARCHITECTURES[True] in (model.hf_config.architectures or ())
    text, dtype = model.hf_text_config, str(model.dtype).removeprefix("torch.")
    found = {
        "speculative decoding": vllm_config.speculative_config is not None,
        "KV connectors (--kv-transfer-config, KV offloading)": vllm_config.kv_transfer_config is not None,
        "decode context parallelism": parallel.decode_context_parallel_size > 1,
        "prefill context parallelism": parallel.prefill_context_parallel_size > 1,
        "--disable-hybrid-kv-cache-manager": bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager),
        f"--kv-cache-dtype {cache.cache_dtype}": cache.cache_dtype not in ("auto", dtype),
        "models of text and images": text is not model.hf_config,
        "mixtures of experts but by `zigzag vllm-args --experts`": model.is_moe and not experts,
        "--experts for models without any": experts and not model.is_moe,
        "latent attention": model.use_mla,
        "layers that read the KV cache of others": bool(getattr(text, "num_kv_shared_layers", 0)),
    }
    reasons = [reason for reason, is_there in found.items() if is_there]
    return f"plans are not served with {', '.join(reasons)} by zigzag_ext's plugin for vLLM" if reasons else None
