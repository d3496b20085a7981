"""PromptCompression: what every method of compressing a prompt says about itself."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

from ...planning.plan import token_count


@dataclass(frozen=True, kw_only=True)
class PromptCompression(ABC):
    """A budget, and how the tokens of a prompt that it is spent on are chosen. Base of the methods; not used itself.

    The first `sink` and the last `observe` tokens of a row are always kept. What lies between is cut into units of `unit` tokens
    from its start; the tokens that are left over at its end are kept with the last ones. The best units by `unit_scores` are kept
    until the budget is spent.

    Args:
        budget: tokens that a row keeps in each retrieval layer, on average over the layers; a float is a share of the row's own
            prompt, of which at least `sink` + `observe` + one unit are kept. A row of no more tokens than that stays as it is.
        observe: last tokens of the prompt whose attention decides; a row that crop() left none of these stays whole.
        sink: first tokens that are always kept; None: as many as the plan's streaming layers keep.
        group: retrieval layers in a row that keep the same tokens, chosen in the first of them.
        slope: how much budgets fall from the first group of layers to the last, in equal steps: the last one has budget / slope,
            the first 2 budget - budget / slope, as in PyramidKV (https://arxiv.org/abs/2406.02069). 1: all alike.
        per_head: every KV head keeps tokens of its own; else all heads of a layer keep the same, by the mean of their scores.
    """

    budget: float | int
    observe: int = 32
    sink: int | None = None
    group: int = 1
    slope: float = 1.0
    per_head: bool = True

    name: ClassVar[str]
    scores: ClassVar[str] = "attention"  # what `unit_scores` are given: the attention mass of the tokens, or "none"

    def __post_init__(self):
        for name in ("observe", "group"):
            object.__setattr__(self, name, _at_least(1, name, getattr(self, name)))
        if self.sink is not None:
            object.__setattr__(self, "sink", _at_least(0, "sink", self.sink))
        if isinstance(self.budget, float):
            if not 0 < self.budget <= 1:
                raise ValueError(f"budget must be a share of the prompt in (0, 1], or a number of tokens; got {self.budget}")
        else:
            object.__setattr__(self, "budget", _at_least(1, "budget", self.budget))
        if isinstance(self.slope, bool) or not isinstance(self.slope, int | float):
            raise TypeError(f"slope must be a number, got {self.slope!r}")
        if not (math.isfinite(self.slope) and self.slope >= 1):
            raise ValueError(f"slope must be at least 1 (equal budgets), got {self.slope}")
        if not isinstance(self.per_head, bool):
            raise TypeError(f"per_head must be True or False, got {self.per_head!r}")
        self._check_tokens(self.sink or 0)

    def __str__(self) -> str:
        """On one line without commas, what is as by default left out: windows 0.12 observe=16."""
        others = (f for f in fields(self) if f.name != "budget" and getattr(self, f.name) != f.default)
        return " ".join([self.name, str(self.budget), *(f"{f.name}={getattr(self, f.name)}" for f in others)])

    @property
    def unit(self) -> int:
        """Tokens that are kept or dropped together."""
        return 1

    @abstractmethod
    def unit_scores(self, scores: Tensor) -> Tensor:
        """[heads, units] from scores [heads, units * unit] of the tokens: the units of the largest ones are kept."""

    def with_sink(self, sink: int) -> "PromptCompression":
        """This method for a plan of `sink` first tokens. Raises ValueError if the budget does not cover what is always kept."""
        if self.sink is not None:
            return self
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return type(self)(**values | {"sink": sink})

    def _check_tokens(self, sink: int) -> None:
        if not isinstance(self.budget, float) and self.budget < sink + self.observe + 1:
            raise ValueError(
                f"a budget of {self.budget} tokens must be at least sink + observe + 1 = {sink} + {self.observe} + 1, which are "
                "the tokens that are always kept and one more"
            )

    def budgets(self, layers: int, held: int) -> list[int]:
        """Tokens that a row of `held` tokens keeps in each of `layers` retrieval layers, in order."""
        mean = self.budget * held if isinstance(self.budget, float) else self.budget
        groups = -(-layers // self.group)
        last = mean / self.slope
        first = 2 * mean - last
        falls = (first - last) / max(1, groups - 1)
        share = [mean] if groups == 1 else [first - falls * group for group in range(groups)]
        least = (self.sink or 0) + self.observe + self.unit
        return [max(least, math.floor(share[layer // self.group] + 1e-6)) for layer in range(layers)]


def _at_least(least: int, name: str, value) -> int:
    if (value := token_count(name, value)) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
