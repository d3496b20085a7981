"""The perplexity of a real model on a real text does not depend on how the text is cut."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from zigzag_ext import demo  # noqa: E402
from zigzag_ext.evaluate.text_perplexity import text_perplexity  # noqa: E402
from zigzag_ext.plan import Plan  # noqa: E402

TOKENS, WINDOW = 512, 64  # 7,000 tokens take half an hour on two cores: python -m zigzag_ext.evaluate.text_perplexity TEXT_FILE
TEXT = Path(__file__).parent.parent / "LICENSE"


@pytest.mark.slow
def test_smollm2_has_one_perplexity_for_every_chunk_size(demo_model):
    """The rings of the demo plan, narrowed, wrap seven times. Full attention must give another number, or this shows nothing."""
    model, tokenizer = demo_model
    ids = tokenizer(TEXT.read_text(), return_tensors="pt")["input_ids"][:, :TOKENS]
    assert ids.shape[1] == TOKENS
    plans = demo.demo_plans()
    plan = Plan(plans["good plan"].kinds, sink=4, window=WINDOW)
    once = text_perplexity(model, ids, plan)
    for chunk in (64, 200):
        assert abs(text_perplexity(model, ids, plan, chunk) - once) <= 1e-3, chunk
    assert 1.5 < once < 30 and abs(text_perplexity(model, ids, plans["full"]) - once) > 1e-3


def test_misuse_raises():
    for ids in (torch.zeros(1, 1, dtype=torch.long), torch.zeros(2, 5, dtype=torch.long), torch.zeros(5, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"token_ids must be \[1, N\]"):
            text_perplexity(None, ids, None)
    with pytest.raises(ValueError, match="chunk must be at least 1 token, got 0"):
        text_perplexity(None, torch.zeros(1, 5, dtype=torch.long), None, 0)
