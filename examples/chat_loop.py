"""A chat on one cache: each turn reads only what is new. Questions are lines; an empty one ends.

echo "What is the capital of France?" | python examples/chat_loop.py
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zigzag_ext as zz

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
plan = zz.load_plan(name, retrieval_ratio=0.5)
zz.enable(model, plan)
cache = zz.ZigzagCache(model.config, plan, max_len=8192)

text, ids = "", torch.zeros(1, 0, dtype=torch.long)  # the conversation so far, as text and as tokens
messages = []
for line in sys.stdin:
    if not line.strip():
        break
    messages.append({"role": "user", "content": line.strip()})
    turn = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    # The tokens of earlier answers stay as they were generated: only what is new is tokenised.
    assert turn.startswith(text), "this template changes earlier turns: reset() and read all of them again"
    new = tokenizer(turn[len(text) :], return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat([ids, new], dim=1)
    held = cache.get_seq_length()
    mask = torch.ones_like(ids)
    output = model.generate(ids, attention_mask=mask, cache=cache, max_new_tokens=48, do_sample=False)
    answer = output[0, ids.shape[1] :]
    print(tokenizer.decode(answer, skip_special_tokens=True))
    print(f"({ids.shape[1] - held} tokens read, {held} were held)")
    text, ids = turn + tokenizer.decode(answer), output
    messages.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
