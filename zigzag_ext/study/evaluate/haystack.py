"""Samples: token sequences of an exact length in which some tokens are to be predicted, and what they are made of.

Prompts are put together from tokens, not from text, so that all prompts of a length can share a batch without padding.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """One sequence; the model is asked for the tokens of `answers`, each from the tokens before it (teacher forcing)."""

    ids: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]  # positions in `ids`, per answer
    needles: tuple[tuple[int, int], ...] = ()  # [start, end) in `ids` of what each answer repeats
    depth: float | None = None  # where the first needle stands: 0 first in the haystack, 1 last
    asked: int | None = None  # tokens before the first answer and its blank; None: before the first target

    @property
    def targets(self) -> list[int]:
        return [position for answer in self.answers for position in answer]

    @property
    def prompt(self) -> int:
        """Tokens of the prompt: those that are read before anything is answered."""
        return min(self.targets) if self.asked is None else self.asked


def encode(tokenizer, text: str) -> list[int]:
    """Tokens of a piece of text, without special ones. Long text may be encoded: no model sees it whole."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def hide(
    tokenizer,
    length: int,
    task: str,
    filler: Sequence[int],
    needles: Sequence[tuple[float, str]],
    dialogue: Sequence[tuple[str, bool]],
) -> Sample:
    """A sample of exactly `length` tokens: the task, filler with needles in it, then questions and answers.

    Args:
        filler: tokens; repeated, and cut at its start, to fill the room. Where it is repeated, needles stand between repetitions.
        needles: (depth in [0, 1], text). Needle i is what answer i repeats, if there are answers for all of them.
        dialogue: (text, whether it is an answer), in order. A blank that is a token of its own before an answer is not asked for:
            after "The key is", how likely it is beside " the" tells of a manner of speaking, and would drown the key itself
            (SmolLM2-135M: 0.9 of the 0.95 nats that a passkey of five digits and its blank cost under full attention).

    Raises:
        ValueError: a depth lies outside [0, 1], or `length` does not hold the task, the needles and the dialogue.
    """
    if outside := [depth for depth, _ in needles if not 0.0 <= depth <= 1.0]:
        raise ValueError(f"depth must be in [0, 1], got {outside[0]}")
    head = list(tokenizer(task)["input_ids"])
    pieces = [(depth, index, encode(tokenizer, text)) for index, (depth, text) in enumerate(needles)]
    tail = [(encode(tokenizer, text), is_answer) for text, is_answer in dialogue]
    needed = len(head) + sum(len(piece) for *_, piece in pieces) + sum(len(tokens) for tokens, _ in tail)
    room = length - needed
    if room < 0:
        raise ValueError(f"a prompt of this task needs at least {needed} tokens, got {length}")
    hay = (list(filler) * (room // len(filler) + 1))[-room:] if room else []
    step = len(filler) if len(filler) < room else 1
    ids, spans, used = head, [(0, 0)] * len(pieces), 0
    for depth, index, piece in sorted(pieces):
        place = max(room - round((1.0 - depth) * room / step) * step, 0)
        ids = ids + hay[used:place]
        spans[index], used = (len(ids), len(ids) + len(piece)), place
        ids = ids + piece
    ids, answers, asked = ids + hay[used:], [], None
    for (tokens, is_answer), (text, _) in zip(tail, dialogue, strict=True):
        if is_answer:
            asked = len(ids) if asked is None else asked
            blank = encode(tokenizer, text[: len(text) - len(text.lstrip())])
            blanks = len(blank) if tokens[: len(blank)] == blank else 0
            answers.append(tuple(range(len(ids) + blanks, len(ids) + len(tokens))))
        ids = ids + tokens
    return Sample(tuple(ids), tuple(answers), tuple(spans), needles[0][0] if needles else None, asked)


@functools.lru_cache(maxsize=1)
def python_reference() -> str:
    """0.45 MB of technical English that comes with every Python: its language reference (PSF licence), as pydoc shows it.

    The text differs a little between Python versions, so compare perplexities of one version only.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the text to read is pydoc's, which this Python lacks (Debian: libpython3-stdlib)") from error

    return "\n\n".join(topics[name] for name in sorted(topics))
