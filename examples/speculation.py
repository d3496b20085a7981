"""Speculative decoding: tokens are drafted from the text itself and checked several at once."""

from transformers import AutoModelForCausalLM, AutoTokenizer

import zigzag_ext as zz

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
zz.enable(model, zz.load_plan(name, retrieval_ratio=0.5))
prompt = "The grass is green. The sky is blue. The sun is yellow. The grass is green. The"
inputs = tokenizer(prompt, return_tensors="pt")

plain = model.generate(**inputs, max_new_tokens=20, do_sample=False)
speculation = zz.speculate("lookup")
drafted = model.generate(**inputs, max_new_tokens=20, do_sample=False, custom_generate=speculation)
print(tokenizer.decode(drafted[0]))
print("same tokens:", drafted.equal(plain))
print(speculation.report)
