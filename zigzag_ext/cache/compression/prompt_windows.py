"""PromptWindows: WindowKV, windows of consecutive tokens."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .method import PromptCompression, _at_least

SCORES = ("max", "mean")


@dataclass(frozen=True, kw_only=True)
class PromptWindows(PromptCompression):
    """Keeps the windows of `window` tokens that the last tokens attend to most.

    Args:
        window: tokens per window.
        score: of a window from its tokens': "max", the mean of the larger half of them, for answers that stand in one place;
            "mean" of all of them, for answers that are put together from many.
        per_head: see `PromptCompression`; heads that choose alone lost more on a small model (docs/evidence.md).
        budget, observe, sink, group, slope: see `PromptCompression`.

    Raises:
        TypeError, ValueError: an argument is no number of the range that it has to be in, or `score` is unknown.

    Source: WindowKV (https://arxiv.org/abs/2503.17922). Deviations: every row of a batch chooses for itself, and
    all KV heads of a layer together; layers have equal budgets and choose alone unless `slope` and `group` say otherwise (there:
    14, and 7 or 8); windows stay in the order of the prompt; first tokens are kept; `score` is the caller's choice instead of a
    classifier's, whose weights were not published.

    Example:
        >>> zz.enable(model, plan, compress=zz.PromptWindows(budget=0.12))
    """

    name: ClassVar[str] = "windows"

    per_head: bool = False
    window: int = 8
    score: str = "max"

    def __post_init__(self):
        object.__setattr__(self, "window", _at_least(1, "window", self.window))
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}; got {self.score!r}")
        super().__post_init__()

    @property
    def unit(self) -> int:
        return self.window

    def unit_scores(self, scores: Tensor) -> Tensor:
        windows = scores.unflatten(-1, (-1, self.window))
        if self.score == "max":
            windows = windows.topk(max(1, self.window // 2), dim=-1).values
        return windows.mean(-1)
