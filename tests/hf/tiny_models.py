"""Tiny random-weight models of every family that zigzag attention is tested on, with no download.

One line per family. Four layers, two KV heads, head_dim 64, float32: small enough that a test of 100 tokens takes a second.
"""

import functools

import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zigzag_ext.hf.cache_argument import cache_argument, split_cache

NUM_LAYERS, VOCAB = 4, 199
FULL = ["full_attention"] * NUM_LAYERS

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,  # wide enough that no two logits of an argmax are within rounding of each other
    "tie_word_embeddings": False,  # tied random weights repeat the last token for ever
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

FAMILIES: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma": {},
    "apertus": {},
    "arcee": {},
    "cohere": {},
    "cohere2": {"layer_types": FULL},
    "ernie4_5": {},
    "exaone4": {"layer_types": FULL, "sliding_window": None},
    "gemma3_text": {"layer_types": FULL},
    "glm": {},
    "glm4": {},
    "gpt2": {"n_embd": 256, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 4096},
    "gpt_neox": {},
    "granite": {},
    "granitemoe": _EXPERTS,
    "helium": {},
    "hunyuan_v1_dense": {},
    "ministral": {"layer_types": FULL},
    "mixtral": {"sliding_window": None, **_EXPERTS},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layer_types": FULL},
    "olmoe": _EXPERTS,
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 256},
    "phi": {},
    "phimoe": {"sliding_window": None, **_EXPERTS},
    "qwen2_moe": {"shared_expert_intermediate_size": 64, **_EXPERTS},
    "qwen3_moe": _EXPERTS,
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}
# Families with sliding windows of their own, and what makes half of the tiny model's layers slide by the config's own rule.
_EVERY_OTHER = {"layer_types": None, "sliding_window_pattern": 2}
_LATER_HALF = {"use_sliding_window": True, "max_window_layers": 2}
WINDOWED: dict[str, dict] = {
    "afmoe": {"global_attn_every_n_layers": 2, **_EXPERTS},
    "cohere2": _EVERY_OTHER,
    "cohere2_moe": _EVERY_OTHER | _EXPERTS,
    "cwm": {},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
        **_EXPERTS,
        **_LATER_HALF,
    },
    "exaone4": {"layer_types": None, "sliding_window_pattern": 4},
    "exaone_moe": _EXPERTS,
    "gemma2": {"layer_types": None, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 2.0},
    "gemma3_text": _EVERY_OTHER,
    "gpt_oss": {"layer_types": None, **_EXPERTS},
    "granite_swa": {"layer_types": ["full_attention", "sliding_attention"] * 2, "attention_multiplier": 0.125},
    "granitemoe_swa": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "attention_multiplier": 0.125,
        **_EXPERTS,
    },
    "laguna": {"layer_types": ["full_attention", "sliding_attention"] * 2, **_EXPERTS},
    "mellum": {"layer_types": ["sliding_attention", "full_attention"] * 2, **_EXPERTS},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "ministral3": {  # queries grow with the number of times that 16 positions, those that it was trained on first, have passed
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "mistral": {},
    "mixtral": _EXPERTS,
    "modernbert-decoder": {"local_attention": 16, "global_attn_every_n_layers": 2},
    "olmo3": {"layer_types": None},
    "phi3": {},
    "phimoe": _EXPERTS,
    "qwen2": _LATER_HALF,
    "qwen2_moe": {"shared_expert_intermediate_size": 64, **_EXPERTS, **_LATER_HALF},
    "qwen3": _LATER_HALF,
    "qwen3_moe": _EXPERTS | _LATER_HALF,
    "smollm3": {"use_sliding_window": True, "no_rope_layer_interval": 2},
    "starcoder2": {},
    "vaultgemma": {"layer_types": None, "query_pre_attn_scalar": 64, "attn_logit_softcapping": 2.0},
}
# Families with layers that hold a state: recurrent ones beside full attention, or, in the last two, in the same layer.
_ALTERNATING = ["linear_attention", "full_attention"] * 2
_DELTA_NET = {
    "layer_types": _ALTERNATING,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
HYBRID: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1, 3], **_MAMBA},
    "granitemoehybrid": {
        "layer_types": _ALTERNATING,
        "attention_multiplier": 0.125,
        "shared_intermediate_size": 64,
        **_MAMBA,
        **_EXPERTS,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "num_dense_layers": 1, **_EXPERTS},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "linear_attention", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 64,
        **_EXPERTS,
    },
    "olmo_hybrid": _DELTA_NET,
    "qwen3_5_moe_text": {"shared_expert_intermediate_size": 64, **_DELTA_NET, **_EXPERTS},
    "qwen3_5_text": _DELTA_NET,
    "qwen3_next": {"shared_expert_intermediate_size": 64, **_DELTA_NET, **_EXPERTS},
    "falcon_h1": {
        "mamba_d_ssm": 256,
        "mamba_n_heads": 8,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
    "zaya": {},
}
# Families whose last layers read the KV caches of earlier ones, the last of their kind: here layers 4 and 6 read layer 2, layers
# 5 and 7 layer 3. Gemma 4's full layers have heads of their own.
SHARED: dict[str, dict] = {
    "gemma3n_text": {"laurel_rank": 8, "altup_num_inputs": 2},
    "gemma4_text": {"global_head_dim": 128, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
}
_SHARED = {
    "num_hidden_layers": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
    "num_kv_shared_layers": 4,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": VOCAB,
    "initializer_range": 0.05,
}
SHARED = {family: _SHARED | options for family, options in SHARED.items()}
for families in (WINDOWED, HYBRID, SHARED):
    for family in families.keys() - CONFIG_MAPPING.keys():  # of a newer transformers than this
        del families[family]
if Version(transformers.__version__) < Version("5.13"):
    del FAMILIES["nemotron"]  # refused there: its attention does not go through transformers' AttentionInterface


_shared_model = functools.lru_cache(maxsize=4)(lambda family: new_model(family))


def tiny_model(family: str = "llama"):
    """The family's causal LM with the same random weights every time, in eval mode. Tests share it, so they must restore it."""
    model = _shared_model(family)
    kinds = {(p.device.type, p.dtype) for p in model.parameters()}
    assert kinds == {("cpu", torch.float32)}, (
        f"a test has moved the shared {family} model: {kinds}; new_model() gives one of its own"
    )
    return model


def new_model(family: str, **overrides):
    """A model of its own, with some options of its config changed."""
    options = _COMMON | (HYBRID | FAMILIES).get(family, {}) | overrides
    if family in ("gpt2", "opt"):
        options = {name: value for name, value in options.items() if name not in ("head_dim", "num_key_value_heads")}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**options), dtype=torch.float32).eval()


def windowed_model(family: str, window: int, **overrides):
    """A model of its own whose sliding layers see `window` tokens."""
    return new_model(family, **{"sliding_window": window} | WINDOWED[family] | overrides)


def shared_model(family: str, window: int, **overrides):
    """A model of its own whose sliding layers see `window` tokens and whose last layers read the caches of others."""
    model = new_model(family, **{"sliding_window": window} | SHARED[family] | overrides)
    for name, weight in model.named_parameters():
        if name.endswith("q_norm.weight"):  # logits have no other scale; at 1 each query sees one key, and rounding which
            torch.nn.init.constant_(weight, 0.25)
    return model


def prompt(length: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    """Random token ids [batch, length] without the special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_prompt(lengths: list[int], seed: int = 1) -> dict[str, torch.Tensor]:
    """Left-padded prompts of the given lengths: input_ids and attention_mask, [len(lengths), max(lengths)]."""
    width = max(lengths)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return {"input_ids": prompt(width, len(lengths), seed) * mask, "attention_mask": mask}


def generate(model, new_tokens: int, input_ids, **options) -> torch.Tensor:
    """Greedy unless told otherwise; the new tokens [batch, new_tokens]. A cache gets the name that transformers has for it."""
    cache, options = split_cache(options)
    options |= {} if cache is None else cache_argument(model, cache)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    if "attention_mask" not in options:
        options["attention_mask"] = torch.ones_like(input_ids)
    output = model.generate(input_ids, max_new_tokens=new_tokens, **options)
    return output[:, input_ids.shape[1] :]
