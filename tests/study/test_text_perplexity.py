"""The perplexity of a real model on a real text does not depend on how the text is cut."""

import os
import unittest.case
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AttentionInterface  # noqa: E402

from benchmarks.text_perplexity import text_perplexity  # noqa: E402
from zigzag_ext.cli import demo  # noqa: E402
from zigzag_ext.hf.attention import NAME, attention  # noqa: E402
from zigzag_ext.planning.plan import Plan  # noqa: E402

TOKENS, WINDOW = 512, 64
TEXT = Path(__file__).parents[2] / "LICENSE"
LONG = 7000  # tokens; four and a half minutes of a CPU core, so there only if this variable is set:
SWITCH = "ZIGZAG_LONG_TESTS"
LONG_TEXT = Path(unittest.case.__file__)  # English and code, on every machine


def tokens(tokenizer, text: Path, count: int, device: str) -> torch.Tensor:
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"][:, :count]
    assert ids.shape[1] == count
    return ids.to(device)


@pytest.mark.slow
def test_smollm2_has_one_perplexity_for_every_chunk_size(demo_model):
    """The rings of the demo plan, narrowed, wrap seven times. Full attention must give another number, or this shows nothing."""
    model, tokenizer = demo_model
    ids = tokens(tokenizer, TEXT, TOKENS, "cpu")
    plans = demo.demo_plans()
    plan = Plan(plans["good plan"].kinds, sink=4, window=WINDOW)
    once = text_perplexity(model, ids, plan)
    for chunk in (64, 200):
        assert abs(text_perplexity(model, ids, plan, chunk) - once) <= 1e-3, chunk
    assert 1.5 < once < 30 and abs(text_perplexity(model, ids, plans["full"]) - once) > 1e-3


@pytest.fixture
def half_attention():
    """Attention in float16, for the CUDA kernels; the rest of the model may then be float32.

    Rounded to 16 bits, matrix products of chunks of different sizes may differ by more than attention does.
    """

    def attend(module, query, key, value, *args, **options):
        out, weights = attention(module, query.half(), key.half(), value.half(), *args, **options)
        return out.to(query.dtype), weights

    AttentionInterface.register(NAME, attend)
    yield
    AttentionInterface.register(NAME, attention)


if torch.cuda.is_available() or os.environ.get(SWITCH):

    @pytest.mark.slow
    def test_7000_tokens_have_one_perplexity_for_every_chunk_size(device, request):
        """The demo plan as it is: 16 rings of 4 + 256 tokens wrap 27 times."""
        if device == "cuda":
            request.getfixturevalue("half_attention")
        request.getfixturevalue("demo_model")  # skips where the model is not installed
        model, tokenizer = demo.load(device, "float32")
        ids, plan = tokens(tokenizer, LONG_TEXT, LONG, device), demo.demo_plans()["good plan"]
        values = {chunk: text_perplexity(model, ids, plan, chunk) for chunk in (None, 64, 500, 2048)}
        print(values)
        assert 1.5 < values[None] < 30 and max(values.values()) - min(values.values()) <= 1e-3, values


def test_misuse_raises():
    for ids in (torch.zeros(1, 1, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long), torch.zeros(5, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"token_ids must be \[1, N\]"):
            text_perplexity(None, ids, None)
    with pytest.raises(ValueError, match="chunk must be at least 1 token, got 0"):
        text_perplexity(None, torch.zeros(1, 5, dtype=torch.long), None, 0)
