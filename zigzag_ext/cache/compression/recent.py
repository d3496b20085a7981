"""RecentOnly: the first and the last tokens, as a streaming layer would."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .method import PromptCompression


@dataclass(frozen=True, kw_only=True)
class RecentOnly(PromptCompression):
    """Keeps the first `sink` tokens and the last ones that the budget has room for, whatever they say.

    Args: see `PromptCompression`.

    Source: StreamingLLM (https://arxiv.org/abs/2309.17453), applied once, to the prompt.
    """

    name: ClassVar[str] = "recent"

    scores: ClassVar[str] = "none"

    def unit_scores(self, scores: Tensor) -> Tensor:
        return torch.arange(scores.shape[-1], dtype=torch.float32, device=scores.device).expand_as(scores)
