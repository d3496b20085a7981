"""Fixtures of speculative decoding's tests: one thread for tiny models, drafts that are as right as a test wants them."""

import pytest
from character_model import one_thread  # noqa: F401
from tiny_models import VOCAB

from zigzag_ext.speculation import loop
from zigzag_ext.speculation.lookup import Lookup


@pytest.fixture
def force_drafts(monkeypatch):
    """`force_drafts(expected, right)`: lookups draft the row's expected next tokens, of which the first `right` are right.

    expected: [batch, n] new tokens of plain decoding. Rows are told by the order in which they are made.
    """

    def force(expected, right: int):
        rows = iter(expected.tolist())

        class Forced(Lookup):
            def __init__(self, tokens, min_match):
                super().__init__(tokens, min_match)
                self.next, self.start = next(rows), len(tokens)

            def draft(self, most):
                done = len(self.tokens) - self.start
                told = self.next[done : done + most]
                wrong = [3 + (token - 2) % (VOCAB - 3) for token in told]
                return told[:right] + wrong[right:]

        monkeypatch.setattr(loop, "Lookup", Forced)

    return force
