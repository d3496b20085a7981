"""Passkey retrieval: a five-digit number is hidden in filler text and asked for at the end.

Based on the passkey task of Landmark Attention (https://arxiv.org/abs/2305.16300). A number can only be repeated if the
position where it stood is still attended, so a plan that streams the wrong layers misses it.
"""

import random
import re
from dataclasses import dataclass

from .haystack import Sample, encode, hide
from .task import Task

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n"
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class PasskeyPrompt:
    """One question: the model continues `text`, and should begin with `key`."""

    text: str
    key: str
    tokens: int  # length of `text` under the tokenizer it was built for
    depth: float  # where the key stands: 0 first in the filler, 1 last
    seed: int


def build_prompt(tokenizer, tokens: int, depth: float = 0.25, seed: int = 0) -> PasskeyPrompt:
    """The longest passkey prompt of at most `tokens` tokens.

    Args:
        tokenizer: a transformers tokenizer; the prompt is plain text for it to continue, without a chat template.
        tokens: upper bound on the prompt's length in tokens.
        depth: place of the key in the filler, in [0, 1].
        seed: chooses the key; the same arguments always give the same prompt.

    Raises:
        ValueError: `depth` is outside [0, 1], or `tokens` does not hold the task without any filler.
    """
    if not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth must be in [0, 1], got {depth}")
    key = str(random.Random(seed).randint(10000, 99999))

    def attempt(repeats: int) -> tuple[str, int]:
        before = round(depth * repeats)
        text = TASK + FILLER * before + NEEDLE.format(key=key) + FILLER * (repeats - before) + QUESTION
        return text, len(tokenizer(text)["input_ids"])

    empty, per_repeat = attempt(0)[1], attempt(2)[1] - attempt(1)[1]
    if tokens < empty:
        raise ValueError(f"a passkey prompt needs at least {empty} tokens, got tokens={tokens}")
    repeats = (tokens - empty) // per_repeat + 1
    text, length = attempt(repeats)
    while length > tokens:
        repeats -= 1
        text, length = attempt(repeats)
    return PasskeyPrompt(text, key, length, depth, seed)


def is_hit(prompt: PasskeyPrompt, answer: str) -> bool:
    """Whether the first number of the answer is the key: a longer number that contains the key is a miss."""
    number = re.search(r"\d+", answer)
    return number is not None and number.group() == prompt.key


def _build(tokenizer, length: int, depth: float, rng: random.Random) -> Sample:
    key = str(rng.randint(10000, 99999))
    needle = " " + NEEDLE.format(key=key).strip()
    filler = encode(tokenizer, " " + FILLER.strip())
    return hide(tokenizer, length, TASK.strip(), filler, [(depth, needle)], [(QUESTION, False), (f" {key}", True)])


passkey = Task("passkey", _build)
