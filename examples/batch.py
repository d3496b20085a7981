"""Prompts of several lengths in one batch: each row answers as it does alone."""

from transformers import AutoModelForCausalLM, AutoTokenizer

import zigzag_ext as zz

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
zz.enable(model, zz.load_plan(name, retrieval_ratio=0.5))

prompts = [
    "The capital of France is",
    "Water boils at a temperature of",
    "The first three prime numbers are 2, 3 and",
]
inputs = tokenizer(prompts, padding=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
for text in tokenizer.batch_decode(output, skip_special_tokens=True):
    print(repr(text))

alone = model.generate(**tokenizer(prompts[0], return_tensors="pt"), max_new_tokens=6, do_sample=False)
print("alone, the same:", tokenizer.decode(alone[0]) == tokenizer.decode(output[0], skip_special_tokens=True))
