"""Speculative decoding of a real model on real text:  python -m benchmarks.speculate_text --csv speculate_cpu.csv

SmolLM2-135M-Instruct, greedy, one row, under the demo's good plan (half of the layers stream). Three tasks over text that comes
with every Python: continuing technical text, extracting long quotes from it, and editing code. Acceptance and tokens per round
are those of this model and text; a small model repeats itself more than a large one. Times of a CPU say little about a GPU.
"""

import argparse
import inspect
import sys
import textwrap
from pathlib import Path

import torch
import transformers

import zigzag_ext as zz
from zigzag_ext.cache import ZigzagCache
from zigzag_ext.cli import demo
from zigzag_ext.hf.cache_argument import cache_argument
from zigzag_ext.study.evaluate.haystack import python_reference

from .report.records import SpeculateRecord, writer
from .timing import machine
from .timing.model_memory import kv_bytes, peak_bytes, weight_bytes

TASKS = ("continuation", "quotes", "code_edit")
DRAFTS = ("off", "lookup", "streaming", "auto")
TOKENS, WINDOW, NEW = 7, 256, 192  # of a draft, of the streaming draft's view, new tokens per call


def prompts(tokenizer, tokens: int) -> dict[str, torch.Tensor]:
    """One prompt of about `tokens` tokens per task, [1, n]."""
    reference = python_reference()
    text = tokenizer.decode(tokenizer(reference, verbose=False).input_ids[: tokens - 100])
    code = "\n".join(inspect.getsource(textwrap).splitlines()[60:])
    code = tokenizer.decode(tokenizer(code, verbose=False).input_ids[: min(900, tokens - 100)])
    asked = {
        "quotes": f"{text}\n\nRepeat the first paragraphs of the text above word for word.",
        "code_edit": f"```python\n{code}\n```\n\nWrite this code again, with the variable `chunks` renamed to `pieces`.",
    }
    chats = {name: [{"role": "user", "content": content}] for name, content in asked.items()}
    options = {"tokenize": False, "add_generation_prompt": True}
    texts = {"continuation": text} | {name: tokenizer.apply_chat_template(chat, **options) for name, chat in chats.items()}
    starts = {"continuation": "", "quotes": text[:60], "code_edit": "```python\n"}
    return {name: tokenizer(text + starts[name], return_tensors="pt", verbose=False).input_ids for name, text in texts.items()}


def run(model, plan: zz.Plan, ids: torch.Tensor, draft: str, new: int) -> tuple:
    """The new tokens, the report, and the cache, of one call."""
    cache = ZigzagCache(model.config, plan, max_len=ids.shape[1] + new, rollback=TOKENS)
    speculation = zz.speculate(draft, TOKENS, WINDOW)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
        custom_generate=speculation, **cache_argument(model, cache),
    )  # fmt: skip
    return output[0, ids.shape[1] :], speculation.report, cache


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1500, help="of a prompt, about (default 1500)")
    parser.add_argument("--new-tokens", type=int, default=NEW, help=f"of an answer (default {NEW})")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each draft, in turns; the fastest counts (default 3)")
    parser.add_argument("--task", choices=TASKS, action="append", help="may be repeated; default: all")
    parser.add_argument("--csv", type=Path, help="file for the results, to which rows are added; name it speculate*.csv")
    parser.add_argument("--commit", default=machine.commit(), help="name of the measured source")
    args = parser.parse_args(argv)
    model, tokenizer = demo.load("cpu", "float32")
    plan = demo.demo_plans()["good plan"]
    origin = {"commit": args.commit, "gpu": machine.processor("cpu"), "driver": "-", "torch": torch.__version__}
    origin |= {"transformers": transformers.__version__, "model": "smollm2-135m", "impl": "zigzag_eager", "plan": "exclusive_50"}
    with writer(args.csv, SpeculateRecord, go_on=True) as add, torch.no_grad(), zz.zigzag(model, plan):
        for task, ids in prompts(tokenizer, args.tokens).items():
            if task not in (args.task or TASKS):
                continue
            found: dict[str, list] = {draft: [] for draft in DRAFTS}
            for _ in range(args.repeats):
                for draft in DRAFTS:
                    found[draft].append(run(model, plan, ids, draft, args.new_tokens))
            plain = found["off"][0][0]
            for draft, calls in found.items():
                tokens, report, cache = min(calls, key=lambda call: call[1].rounds_ms)
                ms = report.rounds_ms / (len(tokens) - 1)
                add(
                    SpeculateRecord(
                        **origin, phase=task, context=ids.shape[1], wall_ms=report.ms_per_round, gpu_ms=0.0, launches=0.0,
                        kv_bytes=kv_bytes(cache), peak_bytes=peak_bytes(model, cache), weight_bytes=weight_bytes(model), batch=1,
                        draft=draft, tokens=TOKENS if draft != "off" else 0, acceptance=report.acceptance(), rounds=report.rounds,
                        ms_per_token=ms,
                    )
                )  # fmt: skip
                same = "the tokens" if tokens.equal(plain) else "NOT the tokens"
                print(f"{task}, {ids.shape[1]} tokens: {same} of plain decoding\n{report}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
