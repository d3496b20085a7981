"""A LoRA adapter on an enabled model: active, switched off, and merged into the weights."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import zigzag_ext as zz

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
# Random weights stand in for an adapter of yours: PeftModel.from_pretrained(model, FOLDER).
torch.manual_seed(0)
adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
model = get_peft_model(model, adapter).eval()
zz.enable(model, zz.load_plan(name, retrieval_ratio=0.5))

inputs = tokenizer("The capital of France is", return_tensors="pt")


def answer(model):
    return tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])


adapted = answer(model)
print("with the adapter:   ", repr(adapted))
with model.disable_adapter():
    print("without:            ", repr(answer(model)))
merged = model.merge_and_unload()  # stays enabled
print("merged, the same:   ", answer(merged) == adapted)
