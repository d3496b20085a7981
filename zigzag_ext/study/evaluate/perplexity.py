"""Perplexity of long text: the last tokens of a passage, each given all that stands before it.

Only the end of a passage is scored, where a streaming layer has forgotten most of it. The text is Python's own language
reference: technical English that is on every machine that can run this, under a free licence (see `python_reference`).
"""

import functools

from .haystack import Sample, encode, python_reference
from .task import Task

SCORED_TOKENS = 512


def _build(tokenizer, length: int, depth: None, rng) -> Sample:
    text = _encoded(tokenizer)
    if not 2 <= length <= len(text):
        raise ValueError(f"perplexity takes passages of 2 to {len(text)} tokens, got {length}")
    start = rng.randrange(len(text) - length + 1)
    scored = min(SCORED_TOKENS, length - 1)
    return Sample(tuple(text[start : start + length]), (tuple(range(length - scored, length)),))


@functools.lru_cache(maxsize=1)
def _encoded(tokenizer) -> list[int]:
    return encode(tokenizer, python_reference())


perplexity = Task("perplexity", _build, has_depth=False)
