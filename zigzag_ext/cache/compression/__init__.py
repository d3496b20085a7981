"""Prompt compression: retrieval layers keep, after the prompt, only the tokens that its last tokens attend to.

One method per file, all on the same cache, so that only the choice of tokens differs.
"""

from .chunkkv import ChunkKV
from .method import PromptCompression
from .prompt_windows import PromptWindows
from .pyramidkv import PyramidKV
from .recent import RecentOnly
from .snapkv import SnapKV

METHODS: dict[str, type[PromptCompression]] = {
    method.name: method for method in (PromptWindows, SnapKV, PyramidKV, ChunkKV, RecentOnly)
}

__all__ = ["METHODS", "ChunkKV", "PromptCompression", "PromptWindows", "PyramidKV", "RecentOnly", "SnapKV"]
