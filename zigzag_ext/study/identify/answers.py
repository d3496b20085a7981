"""What methods share that ask how likely the right answers are while some layers or heads stream.

Every answer weighs the same, whatever its length: the mean per token within an answer, then the mean over answers. In a mean
over all tokens, eight words weigh three times what a number of four digits weighs, and hide it when that number is lost.
"""

import numpy as np

from ...planning.plan import Plan
from ..evaluate.scoring import score
from .method import Method, Settings


class Answers(Method):
    TOKENS, PROMPTS = 1024, 4

    def __init__(self, model, tokenizer, settings: Settings, batch_tokens: int | None = None):
        super().__init__(model, tokenizer, settings)
        self.batch_tokens = batch_tokens
        self.samples = [self.sample(number) for number in range(settings.prompts)]

    def logprob(self, retrieval: np.ndarray) -> float:
        """Natural log-probability per token of an answer, mean over all answers. retrieval: bool [layers, kv_heads]."""
        plan = Plan.from_heads(retrieval, sink=self.settings.sink, window=self.settings.window)
        verdicts = score(self.model, self.samples, plan.with_native(self.native), self.batch_tokens)
        return float(np.mean([verdict.answers for verdict in verdicts]))
