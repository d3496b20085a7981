"""Multi-key needles: several names have a number each, and one name is asked for. The others are distractors.

After the multi-key task of RULER (https://arxiv.org/abs/2404.06654), with own text and words.
"""

from .haystack import Sample, encode, hide
from .passkey import FILLER
from .task import Task

KEYS = 4
_WORDS = (
    "anchor basket candle dragon engine feather garden hammer island jacket kettle ladder mirror needle orange pencil "
    "quarry ribbon saddle temple umbrella violin window yellow zipper bridge castle desert forest guitar harbor lantern"
)
NAMES = _WORDS.split()


def _build(tokenizer, length: int, depth: float, rng) -> Sample:
    names = rng.sample(NAMES, KEYS)
    numbers = [str(number) for number in rng.sample(range(10000, 100000), KEYS)]
    depths = [depth, *(rng.random() for _ in names[1:])]
    needles = [(d, f" The number of the {name} is {number}.") for d, name, number in zip(depths, names, numbers, strict=True)]
    task = "Some things in the following text have a number. Remember the numbers, I will ask you for one.\n"
    question = f"\nWhat is the number of the {names[0]}? The number of the {names[0]} is"
    filler = encode(tokenizer, " " + FILLER.strip())
    return hide(tokenizer, length, task, filler, needles, [(question, False), (f" {numbers[0]}", True)])


multikey = Task("multikey", _build)
