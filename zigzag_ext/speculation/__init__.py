"""Speculative decoding on an enabled model: `model.generate(**inputs, custom_generate=zz.speculate())`."""

from .report import Report
from .speculation import Speculation, speculate

__all__ = ["Report", "Speculation", "speculate"]
