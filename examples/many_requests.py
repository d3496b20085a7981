"""Requests that come and go while others run: each has its own length, sampling and end."""

from transformers import AutoModelForCausalLM, AutoTokenizer

import zigzag_ext as zz

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model = AutoModelForCausalLM.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
plan = zz.load_plan(name, retrieval_ratio=0.5)

with zz.Engine(model, plan, max_len=2048, max_rows=4, tokenizer=tokenizer) as engine:
    prompts = ["The capital of France is", "Water boils at a temperature of", "The first three prime numbers are 2, 3 and"]
    for completion in engine.generate(prompts, zz.Sampling(max_tokens=24, stop=[".", "\n"])):
        print(repr(completion.text), completion.finish_reason, completion.prompt_tokens, len(completion.token_ids))

    endless = engine.submit("Count: 1, 2, 3,", zz.Sampling(max_tokens=2000, ignore_eos=True))
    quick = engine.submit(prompts[0], zz.Sampling(max_tokens=6))
    print("beside another one, the same:", quick.result().text.startswith(" Paris"))
    endless.cancel()
    print(endless.result().finish_reason, engine.stats()["kv_bytes"], "bytes")
