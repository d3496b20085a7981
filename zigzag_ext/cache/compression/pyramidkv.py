"""PyramidKV: SnapKV with budgets that fall from layer to layer."""

from dataclasses import dataclass
from typing import ClassVar

from .snapkv import SnapKV


@dataclass(frozen=True, kw_only=True)
class PyramidKV(SnapKV):
    """`SnapKV` with budgets that fall in equal steps over the retrieval layers, see `PromptCompression.slope`.

    Source: PyramidKV (https://arxiv.org/abs/2406.02069). Deviation: only retrieval layers share the budget.
    """

    name: ClassVar[str] = "pyramidkv"

    slope: float = 20.0
