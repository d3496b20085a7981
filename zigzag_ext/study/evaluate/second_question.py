"""A second question: of several names with a number each one is asked for, and once that is answered another one, which counts.

The prompt ends with the first question. Where prompts are compressed, the last tokens of which decide what stays, this tells what
is lost of the rest. After SCBench's several turns over one context (https://arxiv.org/abs/2412.10319), with multikey's text.
"""

from dataclasses import replace

from .haystack import Sample, encode, hide
from .multikey import KEYS, NAMES
from .passkey import FILLER
from .task import Task


def _build(tokenizer, length: int, depth: float, rng) -> Sample:
    names = rng.sample(NAMES, KEYS)
    numbers = [str(number) for number in rng.sample(range(10000, 100000), KEYS)]
    depths = [depth, *(rng.random() for _ in names[1:])]
    needles = [(d, f" The number of the {name} is {number}.") for d, name, number in zip(depths, names, numbers, strict=True)]
    task = "Some things in the following text have a number. Remember the numbers, I will ask you for two.\n"
    dialogue = []
    for name, number in ((names[1], numbers[1]), (names[0], numbers[0])):
        dialogue += [(f"\nWhat is the number of the {name}? The number of the {name} is", False), (f" {number}", True)]
    sample = hide(tokenizer, length, task, encode(tokenizer, " " + FILLER.strip()), needles, dialogue)
    return replace(sample, answers=sample.answers[1:])


second_question = Task("second_question", _build)
