"""Keys and values as int8 codes: the cache takes about a quarter of the memory of float32."""

from transformers import AutoModelForCausalLM, AutoTokenizer

import zigzag_ext as zz

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
plain = zz.load_plan(name, retrieval_ratio=0.5)
inputs = tokenizer("The grass is green. " * 100 + "The capital of France is", return_tensors="pt")

for plan in (plain, plain.with_formats(kv_format="int8", ring_kv_format="int8")):
    with zz.zigzag(model, plan):
        cache = zz.ZigzagCache(model.config, plan)
        output = model.generate(**inputs, cache=cache, max_new_tokens=4, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    print(f"{str(plan.kv_format):5} {cache.kv_bytes():>10,} bytes  {answer!r}")
