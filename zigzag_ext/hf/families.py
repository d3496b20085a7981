"""Which model families zigzag attention serves exactly, decided from the config and the parameters. All others raise by name."""

import inspect
import sys

from torch import nn
from transformers.cache_utils import Cache

from ..attention.ops import DTYPES, HEAD_DIMS, MAX_GROUP_SIZE
from ..cache.states import check_served
from ..planning.layers import EMPTY, FULL, HYBRID, SLIDING, STATES, geometries, kv_sources, layer_kinds, text_config
from ..planning.native import native_windows
from ..planning.origin import origin_of
from .own_config import text_decoder


def check_family(model: nn.Module) -> None:
    """Raises ValueError naming the family, the reason, and the layer where there is one, if `model` cannot be served exactly.

    Of a composite model the text decoder is looked at.
    """
    reason, decoder = _composition(model), text_decoder(model)
    if reason := reason or next((why for check in _CHECKS if (why := check(decoder, decoder.config))), None):
        raise ValueError(f"{model.config.model_type} is not supported by zigzag attention: {reason}")


def _composition(model):
    if model.config.is_encoder_decoder:
        return "it is an encoder-decoder model"
    decoder = text_decoder(model)
    if decoder is None:
        return "the text decoder of this composite model is no model of its own"
    if decoder.config.is_encoder_decoder:
        return "its text model is an encoder-decoder model"


def _not_causal(model, config):
    for name, module in model.named_modules():
        if getattr(module, "is_causal", True) is False:
            return f"its attention {name} ({type(module).__name__}) is not causal; only decoder self-attention is served"


def _dtype(model, config):
    dtype = model.dtype
    if dtype.itemsize > 1 and dtype not in DTYPES:  # smaller ones are storage of quantized weights
        return f"its dtype is {str(dtype)[6:]}; supported: float16, bfloat16, and float32 on the CPU"


def _layer_kinds(model, config):
    for field in ("layer_types", "layers_block_type"):
        for index, kind in enumerate(getattr(config, field, None) or ()):
            if kind not in (*FULL, SLIDING, *STATES, *EMPTY):
                return (
                    f"layer {index} is '{kind}' in config.{field}; full attention, sliding windows and layers with a state of "
                    "fixed size are served"
                )


def _windows(model, config):
    try:
        windows = set(native_windows(config)) - {None, 0}
    except ValueError as error:
        return str(error)
    if windows and not hasattr(sys.modules[type(model).__module__], "create_sliding_window_causal_mask"):
        return f"its config names a sliding window of {windows.pop()} tokens, and its code makes no such mask"


def _states(model, config):
    kinds = set(layer_kinds(config) or ())
    if not kinds & {*STATES, *EMPTY, *HYBRID}:
        return None
    if not kinds & {*FULL, SLIDING}:
        return "none of its layers has attention"
    try:
        check_served(config)
    except ValueError as error:
        return str(error).partition(": ")[2]
    code = vars(sys.modules[type(model).__module__])
    if own := [name for name, each in code.items() if inspect.isclass(each) and issubclass(each, Cache) and _is_of(each, code)]:
        return f"its layers keep their states in a cache of its own ({own[0]})"
    if "create_recurrent_attention_mask" not in code:
        return "its layers with states take padding by a rule of its own"


def _is_of(kind: type, code: dict) -> bool:
    """Whether a class was defined in the module with these variables."""
    return kind.__module__ == code["__name__"]


def _softcap(model, config):
    if getattr(config, "attention_logit_cap", None):
        return f"its attention logits are capped (config.attention_logit_cap = {config.attention_logit_cap}) by a rule of its own"


def _learned_sinks(model, config):
    for name, _ in model.named_parameters():
        if name.endswith("attention_sink_bias"):
            return f"it has learned sink logits by a rule of its own ({name})"


def _latent_attention(model, config):
    if getattr(config, "kv_lora_rank", None):
        given = f"config.kv_lora_rank = {config.kv_lora_rank}"
        return f"it uses multi-head latent attention ({given}): k and v differ in size (docs/latent_attention.md)"


def _shared_caches(model, config):
    said = [layer for layer, source in enumerate(kv_sources(config)) if layer != source]
    found = sorted(module.layer_idx for module in model.modules() if getattr(module, "is_kv_shared_layer", False))
    if said != found:
        return f"by its config layers {said} read the KV caches of others, by its code layers {found}"


def _geometry(model, config):
    try:
        sizes, _ = geometries(config), origin_of(config)
    except ValueError as error:
        return str(error)
    for num_q_heads, num_kv_heads, head_dim in dict.fromkeys(sizes):
        if head_dim not in HEAD_DIMS:
            return f"its head_dim is {head_dim}; supported: {', '.join(map(str, HEAD_DIMS))}"
        if num_q_heads % num_kv_heads or num_q_heads // num_kv_heads > MAX_GROUP_SIZE:
            return f"{num_q_heads} query heads share {num_kv_heads} KV heads; supported: groups of 1 to {MAX_GROUP_SIZE}"
        if (value_dim := getattr(config, "v_head_dim", None)) not in (None, head_dim):
            return f"its values have {value_dim} elements, its keys {head_dim}; one number is served"


_SHARED = "its attention modules serve several layers each, and do not say which one they run as"
_OWN_ATTENTION = {
    "diffllama": "its layers attend twice, with the halves of their values",
    "doge": "its attention takes a mask that depends on the values",
    "hrm_text": "its layers run several times in one forward",
    "jamba": "its recurrent layers start from no state in a forward of several tokens, and so would each chunk of a prompt",
    "zamba": _SHARED,
    "zamba2": _SHARED,
}


def _own_attention(model, config):
    if getattr(config, "cross_attention_layers", None):
        return f"layers {config.cross_attention_layers} attend to images"
    return _OWN_ATTENTION.get(config.model_type)


_IMAGES_SEE_THEMSELVES = ("gemma3", "shieldgemma2")


def images_refused(config) -> str | None:
    """Why prompts with images raise in the forward of a composite model whose text is served, or None."""
    asked = getattr(text_config(config), "use_bidirectional_attention", None)
    if config.model_type in _IMAGES_SEE_THEMSELVES or (text_config(config) is not config and asked == "vision"):
        return "prompts with images raise: the tokens of one image see each other"


def check_smoothing(model: nn.Module, plan) -> None:
    """Raises ValueError if keys are smoothed whose logits meet others than each other: a cap or a learned sink."""
    capped = getattr(text_config(model.config), "attn_logit_softcapping", None)
    if plan.key_smoothing and (capped or any(name.endswith(".sinks") for name, _ in model.named_parameters())):
        raise ValueError(
            f"{model.config.model_type}: key_smoothing moves all logits of a query alike, which soft caps and learned sinks "
            "would notice; use a plan without it"
        )


_CHECKS = (
    _layer_kinds,
    _windows,
    _states,
    _softcap,
    _learned_sinks,
    _latent_attention,
    _shared_caches,
    _own_attention,
    _geometry,
    _not_causal,
    _dtype,
)
