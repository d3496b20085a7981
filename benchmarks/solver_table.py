"""What exclusivity costs in retained score, on head scores that others published:

    python -m benchmarks.solver_table FOLDER_OR_FILE ...

Prints a markdown table: the share of the summed scores that lies in retrieval layers, or heads, at half of the budget. Needs no
model. Files: https://github.com/mit-han-lab/duo-attention (attn_patterns), https://github.com/snu-mllab/KVzip (utils/head_score).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import zigzag_ext as zz

from .report.documents import table

OBJECTIVES = ("mean", "count", "transport", "max", "even")
HEADER = ["scores", "layers x KV heads", "per head", *OBJECTIVES, "mixed layers", "mean and count differ in"]


def row(name: str, scores: np.ndarray) -> list[str]:
    """Cells of one matrix; mixed layers hold both kinds of heads when heads are chosen one by one."""
    layers, kv_heads = scores.shape
    plans = {objective: zz.solve(scores, 0.5, objective) for objective in OBJECTIVES}
    heads = len(plans["mean"].retrieval_layers) * kv_heads
    order = np.argsort(-scores.ravel(), kind="stable")[:heads]
    kept = np.bincount(order // kv_heads, minlength=layers)
    mixed = int(((kept > 0) & (kept < kv_heads)).sum())
    differ = set(plans["mean"].retrieval_layers) ^ set(plans["count"].retrieval_layers)
    retained = [scores.ravel()[order].sum() / scores.sum(), *(plans[objective].retained_score for objective in OBJECTIVES)]
    return [
        name,
        f"{layers} x {kv_heads}",
        *(f"{share:.3f}" for share in retained),
        f"{mixed} of {layers}",
        f"{len(differ)} layers",
    ]


def solver_table(sources: Sequence[Path]) -> str:
    return table(list(HEADER), [row(path.name.removesuffix(".pt"), zz.load_scores(path)) for path in sources])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", type=Path, nargs="+", help="DuoAttention folders, .pt, .tsv, .csv or .npy files")
    print(solver_table(parser.parse_args(argv).scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
