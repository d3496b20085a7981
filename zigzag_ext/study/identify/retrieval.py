"""retrieval: how often a head copies, that is, its strongest key is the token of the needle that has to come next.

Source: Retrieval Head (https://arxiv.org/abs/2404.15574): the share of a needle's tokens, mean over needles, so that long ones
weigh no more than short ones. Deviations: the right answer is fed instead of what the model generates (the same whenever the
model answers right), and a KV head scores as the best query head of its group, in all layers that attend its keys.
"""

import numpy as np
import torch
from torch import Tensor

from ..probe import probe
from ..torch_attention import causal
from .method import Method, Settings, weights_of


class Retrieval(Method):
    def __init__(self, model, tokenizer, settings: Settings):
        super().__init__(model, tokenizer, settings)
        self.state = {"shares": self.zeros(len(self.rows), self.q_heads), "needles": self.zeros(1)}

    @torch.no_grad()
    def step(self, index: int) -> None:
        sample = self.sample(index)
        device = self.model.device
        ids = torch.tensor(sample.ids, device=device)
        targets = torch.tensor(sample.targets, device=device)
        spans = [span for answer, span in zip(sample.answers, sample.needles, strict=True) for _ in answer]
        first, end = torch.tensor(spans, device=device).T
        lengths = [len(answer) for answer in sample.answers]
        found: dict[int, Tensor] = {}

        def attend(layer, query, key, value, scale):
            strongest = weights_of(query, key, targets - 1, scale)[0].argmax(-1)  # [num_q_heads, targets]
            hits = (strongest >= first) & (strongest < end) & (ids[strongest] == ids[targets])
            found[layer] = sum(part.double().mean(-1) for part in hits.split(lengths, -1))
            return causal(query, key, value, scale)

        with probe(self.model, attend):
            self.model(ids[None], use_cache=False, logits_to_keep=1)
        self.state["shares"] += torch.stack([found[layer] for layer in range(len(self.rows))]).cpu()
        self.state["needles"] += len(sample.answers)

    def scores(self) -> np.ndarray:
        rates = self.state["shares"] / self.state["needles"]
        best = rates.unflatten(1, (self.kv_heads, -1)).amax(-1).numpy()
        return np.stack([group.max(0) for group in self.by_row(best)])


METHOD = Retrieval
