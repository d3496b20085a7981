"""Weights of 8 bits by torchao, under a plan: linear layers take half of what they take in bfloat16."""

import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, AutoTokenizer

import zigzag_ext as zz


def megabytes(model: torch.nn.Module) -> float:
    """All weights; codes and scales where they are quantised."""
    parts = [getattr(weight, "qdata", weight) for weight in model.parameters()]
    scales = [weight.scale for weight in model.parameters() if hasattr(weight, "scale")]
    return sum(part.numel() * part.element_size() for part in parts + scales) / 1e6


name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(name)
before = megabytes(model)
quantize_(model, Int8WeightOnlyConfig())  # the embeddings stay as they are, here a fifth of the weights
print(f"{before:.0f} MB of weights became {megabytes(model):.0f} MB")

zz.enable(model, zz.load_plan(name, retrieval_ratio=0.5))
inputs = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]))
