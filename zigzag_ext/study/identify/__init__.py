"""Head scores from a model: one method per file. Each finds by itself how much every KV head needs the whole context."""

import os
from collections.abc import Callable
from importlib import import_module

import numpy as np

METHODS: dict[str, str] = {
    "lazy": "attention that the last queries pay to tokens outside sink and window (LightTransfer, SimLayerKV)",
    "retrieval": "how often a head's strongest key is the needle token to be copied (Retrieval Head)",
    "ablation": "how much likelier the answer is than with this layer or head alone streaming",
    "greedy": "how late a layer streams if the one that the answers miss least goes first, beside those gone before",
    "gates": "trained gates between full and streaming attention (DuoAttention; per layer: LoZA)",
}


def identify(
    model,
    tokenizer,
    method: str = "retrieval",
    *,
    seed: int = 0,
    sink: int = 64,
    window: int = 256,
    tokens: int | None = None,
    prompts: int | None = None,
    output: str | os.PathLike | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
    **options,
) -> np.ndarray:
    """Scores every KV head of `model`: near 1, it needs the whole context; near 0, `sink` + `window` tokens do.

    All methods read synthetic prompts: a long text that hides phrases, numbers, codes and quotations, then questions and their
    answers (after DuoAttention's data, see `data`; the text comes with Python). Nothing is downloaded, and attention weights are
    computed for the few queries that need them only.

    Args:
        model: a causal language model of transformers, in eval mode, on any device and in any dtype.
        tokenizer: its tokenizer.
        method: a name in `METHODS`, or a function of yours as "package.module:function", which is called with (model, tokenizer,
            sink=, window=, seed=), with tokens= and prompts= if they are given, and `options` (docs/compare.md).
        seed: of the prompts. On a CPU equal arguments give equal bits.
        sink, window: tokens that a streaming head would keep; the plan should have the same ones.
        tokens: length of a prompt; None: the method's default.
        prompts: how many; for "gates", training steps. None: the method's default.
        output: where to save the scores (.tsv, .csv, .npy or a folder, see `save_scores`). A run that is interrupted leaves
            `<output>.partial.npz` beside it, and the same call goes on from there, to the same bits.
        advance: called with (steps done, steps in all).
        options: of the method. lazy: queries=64; ablation: level="layer" or "head"; greedy: keep=1 (layers at which
            to stop), exhaustive=False; gates: level="head" or "layer", learning_rate=0.02, regularizer=0.05, batch=1.

    Returns:
        float64 [layers, kv_heads] in [0, 1], a row per full-attention layer: native windows are no plan's to choose. Only the
        order and the gaps within one matrix mean something. Array and file record model, method and geometry (`origin`), which
        plans hand on and `zigzag_ext.enable` compares with the model.

    Raises:
        ValueError: the method or an option is unknown or out of range, the prompts do not fit the model's context, the partial
            file belongs to other arguments, is damaged or was edited, the model's family cannot be computed exactly (see
            `zigzag_ext.enable`), or a function of yours cannot be imported or called, fails, or returns something else.
        OSError: `output` cannot be written; found out before the first step.

    Sources: DuoAttention https://arxiv.org/abs/2410.10819, Retrieval Head https://arxiv.org/abs/2404.15574, LightTransfer
    https://arxiv.org/abs/2410.13846, LoZA https://arxiv.org/abs/2512.23966. Deviations are named in each method's file.

    Example:
        >>> scores = zz.identify(model, tokenizer, "retrieval", output="scores.tsv")  # doctest: +SKIP
        >>> plan = zz.solve(scores, retrieval_ratio=0.5)  # doctest: +SKIP
    """
    settings = {"seed": seed, "sink": sink, "window": window, "tokens": tokens, "prompts": prompts}
    if ":" in method:
        return import_module(".own", __name__).identify_own(method, model, tokenizer, settings, options, output, advance)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; supported: {', '.join(METHODS)}, or package.module:function")
    run = import_module(".run", __name__).run
    kind = import_module(f".{method}", __name__).METHOD
    return run(kind, method, model, tokenizer, settings, options, output, advance)
