"""Head scores: how much each KV head of each layer needs the whole context."""

from .io import load_scores, save_scores

__all__ = ["load_scores", "save_scores"]
