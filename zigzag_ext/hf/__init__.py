"""Zigzag attention inside Hugging Face models: `enable(model, plan)`, then plain `model.generate()`."""

from .enable import disable, enable, zigzag

__all__ = ["disable", "enable", "zigzag"]
