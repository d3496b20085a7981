"""What a model holds between two forwards: `ZigzagCache` and its layers. Needs transformers."""

from .cache import ZigzagCache

__all__ = ["ZigzagCache"]
