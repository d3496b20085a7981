"""Text as it is generated: by a streamer that prints, then piece by piece from an iterator."""

from threading import Thread

from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer, TextStreamer

import zigzag_ext as zz

name = "HuggingFaceTB/SmolLM2-135M-Instruct"
model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
zz.enable(model, zz.load_plan(name, retrieval_ratio=0.5))
inputs = tokenizer("The capital of France is", return_tensors="pt")

model.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=TextStreamer(tokenizer))

pieces = TextIteratorStreamer(tokenizer, skip_prompt=True)
options = dict(inputs, max_new_tokens=8, do_sample=False, streamer=pieces)
Thread(target=model.generate, kwargs=options).start()
for piece in pieces:
    print(repr(piece))
