"""SnapKV: single tokens, by pooled attention."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from .method import PromptCompression, _at_least


@dataclass(frozen=True, kw_only=True)
class SnapKV(PromptCompression):
    """Keeps the tokens that the last tokens attend to most, each by the mean over its `kernel` neighbours.

    Args:
        kernel: odd number of tokens that a score is the mean of, its own in the middle; beyond the ends they count as zeros.
        budget, observe, sink, group, slope, per_head: see `PromptCompression`. No first tokens are kept unless `sink` says so.

    Source: SnapKV (https://arxiv.org/abs/2404.14469). Deviations: grouped query heads choose together, as their keys are one.
    """

    name: ClassVar[str] = "snapkv"

    sink: int | None = 0
    kernel: int = 7

    def __post_init__(self):
        object.__setattr__(self, "kernel", _at_least(1, "kernel", self.kernel))
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        super().__post_init__()

    def unit_scores(self, scores: Tensor) -> Tensor:
        return nn.functional.avg_pool1d(scores, self.kernel, stride=1, padding=self.kernel // 2)
