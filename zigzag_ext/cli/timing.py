"""One timed greedy generation with a plan: what the commands and the demo share."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import TextStreamer

from ..cache import ZigzagCache
from ..cache.compression import PromptCompression
from ..hf import zigzag
from ..hf.cache_argument import cache_argument
from ..planning.plan import Plan
from ..speculation import speculate


@dataclass(frozen=True)
class Generation:
    """What one generation gave and cost. Times are wall-clock seconds; the first new token belongs to the prefill."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    seconds_per_token: float  # of the tokens after the first; NaN if there is only one
    cache_bytes: int
    cache_report: str  # bytes by kind of layer and format
    speculation: str | None = None  # what speculative decoding did


class Clock(TextStreamer):
    """Notes when each token arrives, and hands finished words to `show` if there is one."""

    def __init__(self, tokenizer, show: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.arrivals = show, []

    def put(self, value):
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.arrivals.append(time.perf_counter())
        if self.show is not None:
            super().put(value)

    def end(self):
        if self.show is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False):
        self.show(text)


@torch.inference_mode()
def generate(
    model,
    tokenizer,
    prompt: str,
    plan: Plan,
    max_new_tokens: int,
    show=None,
    compile: bool = False,
    draft: str | None = None,
    compress: PromptCompression | None = None,
    cache: ZigzagCache | None = None,
    save: Path | None = None,
    special_tokens: bool = True,
    **options,
) -> Generation:
    """Continues `prompt` with `plan`, greedily unless `options` for `model.generate` say otherwise.

    The cache is made for exactly this prompt and answer, so `cache_bytes` is what this context needs.

    Args:
        max_new_tokens: 0: the prompt is only read.
        show: called with pieces of text as they are finished.
        compile: as in `zigzag_ext.enable`; the times then include that of compiling.
        draft: as in `zigzag_ext.speculate`; None: plain decoding.
        compress: as in `zigzag_ext.enable`, for a new cache.
        cache: one row, which the prompt goes on behind; its plan is the one that runs. None: a new one.
        save: where to write the cache, with all that was read and generated in it.
        special_tokens: whether the tokenizer adds its own, such as one for the beginning of a text.

    Raises:
        ValueError: plan and model do not fit, or the prompt is empty. What `zigzag_ext.enable` raises.
    """
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=special_tokens)["input_ids"].long().to(model.device)
    prompt_tokens = ids.shape[1]
    if not prompt_tokens:
        raise ValueError("the prompt is empty")
    clock = Clock(tokenizer, show if max_new_tokens else None)
    speculation = None if draft is None else speculate(draft, streamer=clock)
    if cache is None:
        max_len = None if save else prompt_tokens + max(1, max_new_tokens)  # what is saved may go on
        rollback = getattr(speculation, "rollback", 0)
        cache = ZigzagCache(model.config, plan, max_len=max_len, rollback=rollback, compress=compress)
    else:
        ids = torch.cat([cache.state.tokens.ids[:, : cache.state.columns].to(ids), ids], 1)
    options = {"do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    options |= {"streamer": clock} if speculation is None else {"custom_generate": speculation}
    with zigzag(model, plan, compile=compile):
        start = time.perf_counter()
        options |= cache_argument(model, cache)
        output = model.generate(ids, max_new_tokens=max(1, max_new_tokens), **options)
        new = output[0, ids.shape[1] :][:max_new_tokens]
        if save:
            left = output[:, cache.get_seq_length() : ids.shape[1] + max_new_tokens]
            if left.shape[1]:  # the last token, which nothing was generated from
                model(left, **cache_argument(model, cache))
            cache.save(save)
    steps = len(clock.arrivals) - 1
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new),
        prefill_seconds=clock.arrivals[0] - start,
        seconds_per_token=(clock.arrivals[-1] - clock.arrivals[0]) / steps if steps else float("nan"),
        cache_bytes=cache.memory_bytes(),
        cache_report=cache.memory_report(),
        speculation=None if speculation is None else str(speculation.report),
    )
