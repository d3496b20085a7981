"""Multi-passkey prompts: a long text hides passkeys of several words each; all of them are asked for at the end.

After DuoAttention's synthetic data (https://arxiv.org/abs/2410.10819, section 2.3). Deviations: fewer and shorter passkeys, so
that prompts of 1000 tokens hold them, own wording, and Python's language reference as the text around them.
"""

import functools
import random

from ..evaluate.haystack import Sample, encode, hide, python_reference

PASSKEYS, WORDS = 4, 8
_ALPHABET = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo sierra "
    "tango uniform victor whiskey xray yankee zulu"
)
_ORDINALS = ("first", "second", "third", "fourth")
_TASK = "The text below contains four secret phrases. Read it carefully and remember them.\n\n"


def sample(tokenizer, tokens: int, rng: random.Random) -> Sample:
    """A prompt of exactly `tokens` tokens; answer i repeats the words of needle i.

    Raises ValueError if `tokens` do not hold the passkeys, questions and answers.
    """
    words = _ALPHABET.split()
    depths = sorted(rng.uniform(0.05, 0.95) for _ in range(PASSKEYS))
    phrases = [" " + " ".join(rng.choices(words, k=WORDS)) for _ in range(PASSKEYS)]
    told = [
        (depth, f"\n\nThe {ordinal} secret phrase is:{phrase}.\n\n")
        for depth, ordinal, phrase in zip(depths, _ORDINALS, phrases, strict=True)
    ]
    order = rng.sample(range(PASSKEYS), PASSKEYS)
    dialogue = [("\n\nWhat are the secret phrases?", False)]
    for index in order:
        dialogue += [(f"\nThe {_ORDINALS[index]} secret phrase is:", False), (phrases[index], True), (".", False)]
    text = _text(tokenizer)
    start = rng.randrange(max(len(text) - tokens, 1))
    return hide(tokenizer, tokens, _TASK, text[start : start + tokens], [told[index] for index in order], dialogue)


@functools.lru_cache(maxsize=1)
def _text(tokenizer) -> list[int]:
    return encode(tokenizer, python_reference())
