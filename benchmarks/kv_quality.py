"""What quantised caches cost in quality, on the demo model:  python benchmarks/kv_quality.py TEXT_FILE --tokens 2000

Perplexity of a text, and the probability of a passkey given the prompt that hides it (geometric mean over its tokens and over the
prompts), for every KV format, with full attention and with the demo's good plan. Printed as one Markdown table.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from zigzag_ext import ZigzagCache, demo, zigzag
from zigzag_ext.evaluate.passkey import build_prompt
from zigzag_ext.evaluate.text_perplexity import text_perplexity

FORMATS = ("none", "fp8", "int8", "int4", "int8/int4", "int4/int8")


@torch.inference_mode()
def answer_probability(model, tokenizer, prompts, plan) -> float:
    """Geometric mean of the probabilities of the key's tokens, each given the prompt and the tokens before it."""
    log_probability, tokens = 0.0, 0
    for prompt in prompts:
        question = tokenizer(prompt.text, return_tensors="pt")["input_ids"].to(model.device)
        answer = tokenizer(f" {prompt.key}", return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
        cache = ZigzagCache(model.config, plan, max_len=question.shape[1] + answer.shape[1])
        with zigzag(model, plan):
            model(question[:, :-1], past_key_values=cache, logits_to_keep=1)
            step = torch.cat([question[:, -1:], answer[:, :-1]], 1)
            for i in range(step.shape[1]):  # one token at a time: the decode kernels answer
                logits = model(step[:, i : i + 1], past_key_values=cache).logits[0, -1].double()
                log_probability += float(logits.log_softmax(-1)[answer[0, i]])
        tokens += answer.shape[1]
    return float(torch.tensor(log_probability / tokens).exp())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of the text, and of every passkey prompt")
    parser.add_argument("--prompts", type=int, default=3, help="passkey prompts, at different depths")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    model, tokenizer = demo.load(args.device)
    ids = tokenizer(args.text.read_text(), return_tensors="pt")["input_ids"][:, : args.tokens].to(model.device)
    prompts = [build_prompt(tokenizer, args.tokens, (i + 0.5) / args.prompts, seed=i) for i in range(args.prompts)]
    plans = demo.demo_plans()
    print(f"{ids.shape[1]} tokens, {len(prompts)} prompts, {model.device}, {model.dtype}\n")
    print("| layers | keys/values | perplexity | probability of a key's token |\n|---|---|---|---|")
    for name in ("full", "good plan"):
        plan = next(plan for given, plan in plans.items() if given.startswith(name))
        for kv_format in args.formats:
            chosen = replace(plan, kv_format=kv_format)
            perplexity = text_perplexity(model, ids, chosen)
            probability = answer_probability(model, tokenizer, prompts, chosen)
            print(f"| {name} | {kv_format} | {perplexity:.3f} | {probability:.4f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
