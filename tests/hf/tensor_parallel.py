"""One process of tensor parallelism: `torchrun --nproc-per-node 2 tensor_parallel.py cpu|cuda FOLDER` compares a model
whose heads are shared out (`tp_plan="auto"`) with the same model in one piece, on every process."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import new_model, prompt
from transformers import AutoModelForCausalLM

import zigzag_ext as zz


def logits_of(model, plan, tokens, kv_heads) -> torch.Tensor:
    """Of a prompt in chunks, then of single tokens, by a process that keeps the keys of `kv_heads`."""
    cache = zz.ZigzagCache(model.config, plan)
    with zz.zigzag(model, plan), torch.no_grad():
        logits = [model(piece, past_key_values=cache).logits for piece in tokens.split([70, 37] + [1] * 20, dim=1)]
    assert cache.layers[0].keys.shape[1] == kv_heads
    return torch.cat(logits, dim=1).float()


def main(device: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    if dist.get_rank() == 0:
        new_model("llama", num_attention_heads=8, num_key_value_heads=4, vocab_size=200).save_pretrained(folder)
    dist.barrier()
    dtype, tolerance = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 0.05)
    shared = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, tp_plan="auto").eval()
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(shared.device)
    plan, tokens = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16), prompt(127).to(shared.device)
    actual, expected = logits_of(shared, plan, tokens, 2), logits_of(alone, plan, tokens, 4)
    error = float((actual - expected).norm() / expected.norm())
    assert error < tolerance, f"relative error of the logits {error}"

    by_head = zz.Plan([["retrieval", "streaming"] * 2] * 4, sink=4, window=16)
    try:
        logits_of(shared, by_head, tokens, 2)
    except ValueError as refusal:
        assert "the plan is for 4 KV heads, the keys have 2" in str(refusal)
    else:
        raise AssertionError("a head-level plan of all heads was taken for a part of them")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
