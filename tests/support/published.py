"""The published score matrices, which the repository does not hold: where they are, and the mark that skips without them."""

from pathlib import Path

import pytest

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "head_scores"
LLAMA3 = PUBLISHED / "Llama-3-8B-Instruct-Gradient-1048k"  # DuoAttention's, 32 layers x 8 KV heads
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"published score files are not at {PUBLISHED}")
