"""What methods share that ask how likely the right answers are while some layers or heads stream."""

import numpy as np

from ..evaluate.scoring import score
from ..plan import Plan
from .method import Method, Settings


class Answers(Method):
    TOKENS, PROMPTS = 1024, 4

    def __init__(self, model, tokenizer, settings: Settings, batch_tokens: int | None = None):
        super().__init__(model, tokenizer, settings)
        self.batch_tokens = batch_tokens
        self.samples = [self.sample(number) for number in range(settings.prompts)]

    def logprob(self, retrieval: np.ndarray) -> float:
        """Natural log-probability per token of the answers, mean over the samples. retrieval: bool [layers, kv_heads]."""
        plan = Plan.from_heads(retrieval, sink=self.settings.sink, window=self.settings.window)
        verdicts = score(self.model, self.samples, plan, self.batch_tokens)
        return float(np.mean([verdict.logprob for verdict in verdicts]))
