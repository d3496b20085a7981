"""transformers' pipeline with an enabled model: nothing of the pipeline changes."""

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import zigzag_ext as zz

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
zz.enable(model, zz.load_plan(name, retrieval_ratio=0.5))

generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(generator("The capital of France is", max_new_tokens=8, do_sample=False)[0]["generated_text"])

chat = [{"role": "user", "content": "What is the capital of France?"}]
print(generator(chat, max_new_tokens=16, do_sample=False)[0]["generated_text"][-1]["content"])
