"""Perplexity of a text under a plan, read in chunks of any size:  python -m benchmarks.text_perplexity TEXT_FILE

exp of the mean negative log-likelihood per token. The size of the chunks must not matter: prefill follows the rule of decode.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from zigzag_ext.cache import ZigzagCache
from zigzag_ext.hf import zigzag
from zigzag_ext.hf.cache_argument import cache_argument
from zigzag_ext.planning.plan import Plan

_HEAD_TOKENS = 1024  # logits that are made float32 at a time


@torch.inference_mode()
def text_perplexity(model, token_ids: Tensor, plan: Plan, chunk: int | None = None) -> float:
    """Perplexity of tokens 1 ... N - 1 given all before them, read in forwards of `chunk` tokens, or in one.

    Args:
        model: a transformers causal language model, not enabled yet. token_ids: [1, N], N >= 2.

    Raises:
        ValueError: fewer than two tokens, or `chunk` < 1. What `zigzag_ext.enable` raises.
    """
    if token_ids.dim() != 2 or token_ids.shape[0] != 1 or token_ids.shape[1] < 2:
        raise ValueError(f"token_ids must be [1, N] with N >= 2, got {tuple(token_ids.shape)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    total = token_ids.shape[1]
    cache, loss = ZigzagCache(model.config, plan, max_len=total), 0.0
    with zigzag(model, plan):
        for ids in token_ids.split(chunk or total, dim=1):
            start = cache.get_seq_length()
            logits = model(ids, **cache_argument(model, cache)).logits[0]
            targets = token_ids[0, start + 1 : start + 1 + len(logits)]
            for piece, target in zip(logits[: len(targets)].split(_HEAD_TOKENS), targets.split(_HEAD_TOKENS), strict=True):
                loss += float(cross_entropy(piece.float(), target, reduction="sum").double())
    return float(torch.tensor(loss / (total - 1), dtype=torch.float64).exp())


def main(argv: list[str] | None = None) -> int:
    from zigzag_ext.cli import demo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--tokens", type=int, default=7000, help="how much of it (default 7000)")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[64, 500, 2048], help="chunk sizes (default 64 500 2048); and one shot"
    )
    parser.add_argument("--plan", choices=list(demo.demo_plans()), nargs="+", default=["good plan"], help="default: good plan")
    parser.add_argument(
        "--device", default="auto", help="cpu is float32; on a GPU bfloat16 rounds differently for each chunk size"
    )
    args = parser.parse_args(argv)
    model, tokenizer = demo.load(args.device)
    ids = tokenizer(args.text.read_text(), return_tensors="pt")["input_ids"][:, : args.tokens].to(model.device)
    if ids.shape[1] < args.tokens:
        print(f"the text has only {ids.shape[1]} tokens")
    for name in args.plan:
        plan = demo.demo_plans()[name]
        values = {chunk or "one shot": text_perplexity(model, ids, plan, chunk) for chunk in [*args.chunks, None]}
        print(f"{name}: " + ", ".join(f"{chunk}: {value:.4f}" for chunk, value in values.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
