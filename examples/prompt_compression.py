"""Prompts are thinned out once they are read: retrieval layers keep a share of them."""

from transformers import AutoModelForCausalLM, AutoTokenizer

import zigzag_ext as zz

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
plan = zz.load_plan(name, retrieval_ratio=0.5)
filler = "The grass is green. The sky is blue. The sun is yellow. " * 12
prompt = filler + "The pass key is 71432. Remember it. " + filler + "What is the pass key? The pass key is"
inputs = tokenizer(prompt, return_tensors="pt")

for method in (None, zz.ChunkKV(budget=0.4), zz.RecentOnly(budget=0.4)):
    with zz.zigzag(model, plan, compress=method):
        cache = zz.ZigzagCache(model.config, plan, compress=method)
        output = model.generate(**inputs, cache=cache, max_new_tokens=6, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    print(f"{str(method):12} {cache.kv_bytes():>10,} bytes  {answer!r}")
