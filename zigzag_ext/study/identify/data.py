"""Prompts of mixed needles: a long text hides answers of several kinds; all of them are asked for at the end.

After DuoAttention's synthetic data (https://arxiv.org/abs/2410.10819, section 2.3), whose needles are phrases of words alone.
Layers that copy words are not all of those that copy digits, so scores made on one kind choose layers that lose the other: here,
every prompt has `NEEDLES` of each kind in `KINDS`. Each has a name of its own to be asked for by, so those of a kind are each
other's distractors. Fewer and shorter needles than DuoAttention's, so that prompts of 1000 tokens hold them, own wording, and
Python's language reference as the text around them. The evaluation tasks have other text, wording, names, and numbers of another
length.
"""

import functools
import random
import re
from collections.abc import Callable

from ..evaluate.haystack import Sample, encode, hide, python_reference

VERSION = 2  # of what a seed gives; 1: four phrases of words
NEEDLES = 2  # of each kind
_TASK = "Some private notes are hidden in the text below. Read it carefully and remember them.\n\n"
_QUESTION = "\n\nWhat did the private notes say?"
_NAMES = "Ada Boris Clara Dmitri Elena Farid Greta Hugo Irene Jonas Keiko Lars Marta Nadia Oscar Priya"
_ALPHABET = (
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo sierra "
    "tango uniform victor whiskey xray yankee zulu"
)
_DIGITS, _CONSONANTS = "0123456789", "BCDFGHJKLMNPQRSTVWXZ"


def _phrase(rng: random.Random) -> str:
    return " ".join(rng.choices(_ALPHABET.split(), k=8))


def _number(rng: random.Random) -> str:
    return "".join(rng.choices(_DIGITS, k=rng.choice((3, 4, 6, 7, 8))))  # no five: those are the evaluation's


def _code(rng: random.Random) -> str:
    return "".join(rng.choice(alphabet) for alphabet in (_CONSONANTS, _DIGITS) for _ in range(3))


def _quotation(rng: random.Random) -> str:
    return rng.choice(_plain_runs())


KINDS: dict[str, Callable[[random.Random], str]] = {  # what stands before the answer, in the text and when it is asked for
    "The secret phrase of {name} is:": _phrase,
    "The phone of {name} has the digits": _number,
    "The locker of {name} opens with": _code,
    "The favourite quotation of {name} is:": _quotation,
}


def sample(tokenizer, tokens: int, rng: random.Random) -> Sample:
    """A prompt of exactly `tokens` tokens; answer i repeats what needle i says after the same words.

    Raises ValueError if `tokens` do not hold the needles, questions and answers.
    """
    notes = [
        (lead.format(name=name), " " + make(rng)) for lead, make in KINDS.items() for name in rng.sample(_NAMES.split(), NEEDLES)
    ]
    rng.shuffle(notes)  # the order of the questions; the needles' own order is that of their depths
    needles = [(rng.uniform(0.05, 0.95), f"\n\n{lead}{answer}.\n\n") for lead, answer in notes]
    dialogue = [(_QUESTION, False)]
    for lead, answer in notes:
        dialogue += [(f"\n{lead}", False), (answer, True), (".", False)]
    text = _text(tokenizer)
    start = rng.randrange(max(len(text) - tokens, 1))
    return hide(tokenizer, tokens, _TASK, text[start : start + tokens], needles, dialogue)


@functools.lru_cache(maxsize=1)
def _text(tokenizer) -> list[int]:
    return encode(tokenizer, python_reference())


@functools.lru_cache(maxsize=1)
def _plain_runs() -> list[str]:
    """Eight words in a row of the text, with nothing but letters and single spaces: they have the same tokens anywhere."""
    return re.findall(r"(?<=\s)(?:[A-Za-z]+ ){7}[A-Za-z]+(?=\s)", python_reference())
