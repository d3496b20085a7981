"""Models of random weights and plans spread evenly: what benchmarks of whole models share."""

import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GptOssConfig, LlamaConfig, Qwen2Config

import zigzag_ext as zz

K = 1024
SINK, WINDOW = 64, 256
MODELS = {
    "llama3-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=512 * K, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ),
    "llama2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=512 * K,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=512 * K, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "yi-6b": LlamaConfig(
        vocab_size=64000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=512 * K, rope_parameters={"rope_type": "default", "rope_theta": 5e6},
    ),
    "gemma3-27b": Gemma3TextConfig(
        vocab_size=262208, hidden_size=5376, intermediate_size=21504, num_hidden_layers=62, num_attention_heads=32,
        num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168, sliding_window=1024, max_position_embeddings=512 * K,
    ),
    "gpt-oss-20b": GptOssConfig(  # its factor is 32, for 128K tokens
        num_hidden_layers=24, num_local_experts=32, max_position_embeddings=512 * K, rope_parameters={
            "rope_type": "yarn", "rope_theta": 1.5e5, "factor": 128.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4 * K,
        },
    ),
    "tiny-native": Gemma3TextConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, query_pre_attn_scalar=64, sliding_window=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    ),
    "tiny": LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    ),
}  # fmt: skip
PLANS = {
    "retrieval_100": 1.0,
    "exclusive_50": 0.5,
    "exclusive_25": 0.25,
    "heads_50": 0.5,
}  # share that retrieves: layers, or KV heads
HEADS_SEED = 0  # of the heads that retrieve


def build_model(name: str, device: str):
    """Random weights, made on the device; bfloat16 on a GPU, float32 on a CPU."""
    config = MODELS[name]
    config.pad_token_id, config.eos_token_id = 0, None
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32).eval()


def even_plan(num_layers: int, share: float) -> zz.Plan:
    """`share` of the layers retrieve, spread evenly over the depth."""
    kinds = ["retrieval" if int((i + 1) * share) > int(i * share) else "streaming" for i in range(num_layers)]
    return zz.Plan(kinds, sink=SINK, window=WINDOW, provenance={"source": "spread evenly, for timing"})


def mixed_plan(num_layers: int, kv_heads: int, share: float) -> zz.Plan:
    """`share` of the KV heads of every layer retrieve, chosen at random: both kinds in one layer, as DuoAttention leaves them."""
    rng = torch.Generator().manual_seed(HEADS_SEED)
    chosen = [torch.randperm(kv_heads, generator=rng)[: round(kv_heads * share)].tolist() for _ in range(num_layers)]
    retrieval = [[head in heads for head in range(kv_heads)] for heads in chosen]
    return zz.Plan.from_heads(retrieval, sink=SINK, window=WINDOW, provenance={"source": "random heads, for timing"})


def make_plan(name: str, config) -> zz.Plan:
    """A plan of PLANS over the layers with full attention; native windows stay as they are."""
    windows = zz.native_windows(config)
    layers = windows.count(None)
    if name.startswith("heads"):
        plan = mixed_plan(layers, config.num_key_value_heads, PLANS[name])
    else:
        plan = even_plan(layers, PLANS[name])
    return plan.with_native(windows)
