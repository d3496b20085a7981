"""ChunkKV: chunks of consecutive tokens, the same for all heads."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .method import PromptCompression, _at_least


@dataclass(frozen=True, kw_only=True)
class ChunkKV(PromptCompression):
    """Keeps the chunks of `chunk` tokens with the largest sum of attention, over all heads.

    Args:
        chunk: tokens per chunk.
        budget, observe, sink, group, slope, per_head: see `PromptCompression`. No first tokens are kept unless `sink` says so.

    Source: ChunkKV (https://arxiv.org/abs/2502.00299); `group` is its layer-wise index reuse. Deviation: every row of a batch
    chooses for itself.
    """

    name: ClassVar[str] = "chunkkv"

    sink: int | None = 0
    per_head: bool = False
    chunk: int = 10

    def __post_init__(self):
        object.__setattr__(self, "chunk", _at_least(1, "chunk", self.chunk))
        super().__post_init__()

    @property
    def unit(self) -> int:
        return self.chunk

    def unit_scores(self, scores: Tensor) -> Tensor:
        return scores.unflatten(-1, (-1, self.chunk)).sum(-1)
