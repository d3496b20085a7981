"""Quotation: someone said a sentence in a long text, and it is to be repeated word by word.

The text around it, and the words, are Python's language reference. The log-probability tells more than the exact match, which
asks for fourteen words in a row; exp(-logprob) is the perplexity of the answer.
"""

import functools
import re

from .haystack import Sample, encode, hide, python_reference
from .task import Task

WORDS = 14
_SPEAKERS = "Alma Bruno Chiara Dario Esther Fiona Gustav Hanna Ivan Judith Karim Lucia Milan Nora Otto Paula"
_TASK = "Someone says a sentence in the following text. Remember it, I will ask you for it.\n\n"


def _build(tokenizer, length: int, depth: float, rng) -> Sample:
    speaker, words = rng.choice(_SPEAKERS.split()), rng.choice(_runs())
    text = _encoded(tokenizer)
    start = rng.randrange(max(len(text) - length, 1))
    needle = f"\n\n{speaker} said: {words}.\n\n"
    dialogue = [(f"\n\nWhat did {speaker} say? {speaker} said:", False), (f" {words}", True)]
    return hide(tokenizer, length, _TASK, text[start : start + length], [(depth, needle)], dialogue)


@functools.lru_cache(maxsize=1)
def _encoded(tokenizer) -> list[int]:
    return encode(tokenizer, python_reference())


@functools.lru_cache(maxsize=1)
def _runs() -> list[str]:
    """Words in a row with nothing but letters and single spaces: they have the same tokens wherever they stand."""
    return re.findall(rf"(?<=\s)(?:[A-Za-z]+ ){{{WORDS - 1}}}[A-Za-z]+(?=\s)", python_reference())


quotation = Task("quotation", _build)
