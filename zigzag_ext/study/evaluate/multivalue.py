"""Multi-value needles: one name has several numbers, and all of them are asked for, in the order of the text.

After the multi-value task of RULER (https://arxiv.org/abs/2404.06654), with own text; RULER takes the numbers in any order.
"""

from .haystack import Sample, encode, hide
from .multikey import NAMES
from .passkey import FILLER
from .task import Task

VALUES = 3


def _build(tokenizer, length: int, depth: float, rng) -> Sample:
    name = rng.choice(NAMES)
    numbers = [str(number) for number in rng.sample(range(10000, 100000), VALUES)]
    depths = [depth + (1.0 - depth) * index / VALUES for index in range(VALUES)]
    needles = [(d, f" A number of the {name} is {number}.") for d, number in zip(depths, numbers, strict=True)]
    task = f"The {name} has {VALUES} numbers in the following text. Remember them in their order, I will ask you for all.\n"
    question = f"\nWhat are the {VALUES} numbers of the {name}, in their order? They are"
    dialogue = [(question, False), (f" {numbers[0]}", True)]
    for number in numbers[1:]:
        dialogue += [(",", False), (f" {number}", True)]
    return hide(tokenizer, length, task, encode(tokenizer, " " + FILLER.strip()), needles, dialogue)


multivalue = Task("multivalue", _build)
