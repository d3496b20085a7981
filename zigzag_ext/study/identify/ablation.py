"""ablation: what one layer, or one KV head, is worth: how much likelier the answers are than when it alone streams.

With p and p' the geometric mean probability of the answers' tokens under full attention and with the unit streaming, the score
is p / (p + p'): 0.5 if streaming makes no difference, towards 1 if it destroys the answer, below 0.5 if it helps. It never
saturates, so units that do no harm are still told apart. The criterion is this package's own; NLL-guided selection
(https://arxiv.org/abs/2606.27791) ranks layers by the reverse, the gain when one streaming layer becomes full.
"""

import numpy as np

from .answers import Answers
from .method import Settings


class Ablation(Answers):
    def __init__(self, model, tokenizer, settings: Settings, level: str = "layer", batch_tokens: int | None = None):
        if level not in ("layer", "head"):
            raise ValueError(f"level must be 'layer' or 'head', got {level!r}")
        super().__init__(model, tokenizer, settings, batch_tokens)
        self.units = self.layers * (self.kv_heads if level == "head" else 1)
        self.steps = 1 + self.units
        self.state = {"logprob": self.zeros(self.steps)}  # of full attention, then with each unit streaming

    def step(self, index: int) -> None:
        retrieval = np.ones((self.layers, self.kv_heads), dtype=bool)
        if index:
            retrieval.reshape(self.units, -1)[index - 1] = False
        self.state["logprob"][index] = self.logprob(retrieval)

    def scores(self) -> np.ndarray:
        logprob = self.state["logprob"].numpy()
        worth = 1.0 / (1.0 + np.exp(np.clip(logprob[1:] - logprob[0], -500.0, 500.0)))
        return np.broadcast_to(worth.reshape(self.layers, -1), (self.layers, self.kv_heads)).copy()


METHOD = Ablation
