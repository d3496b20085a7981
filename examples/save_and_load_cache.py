"""A long text is read once: its cache goes to a file, and another process goes on behind it."""

import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zigzag_ext as zz

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
plan = zz.load_plan(name, retrieval_ratio=0.5)
zz.enable(model, plan)

filler = "The grass is green. The sky is blue. " * 25
text = tokenizer("The pass key is 71432. Remember it. " + filler, return_tensors="pt")
cache = zz.ZigzagCache(model.config, plan)
start = time.perf_counter()
model.generate(**text, cache=cache, max_new_tokens=1)
print(f"read {cache.get_seq_length()} tokens in {time.perf_counter() - start:.2f} s")
cache.save("text.cache")

# In another process, from here on: the model, and the file.
start = time.perf_counter()
cache = zz.ZigzagCache.load("text.cache", model)
print(f"loaded {cache.get_seq_length()} tokens in {time.perf_counter() - start:.2f} s")
question = tokenizer("What is the pass key? The pass key is", return_tensors="pt")
ids = torch.cat([text["input_ids"], question["input_ids"]], dim=1)  # what the cache holds is not read again
mask = torch.ones_like(ids)
output = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=6, do_sample=False)
print(tokenizer.decode(output[0, ids.shape[1] :]))
