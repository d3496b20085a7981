"""retrieval: how often a head copies, that is, its strongest key is the token of the needle that has to come next.

Source: Retrieval Head (https://arxiv.org/abs/2404.15574). Deviations: the right answer is fed instead of what the model
generates (the same whenever the model answers right), and a KV head scores as the best query head of its group.
"""

import numpy as np
import torch
from torch import Tensor

from ..hf.probe import probe
from ..hf.torch_attention import causal
from .method import Method, Settings, weights_of


class Retrieval(Method):
    def __init__(self, model, tokenizer, settings: Settings):
        super().__init__(model, tokenizer, settings)
        self.state = {"hits": self.zeros(self.layers, self.q_heads), "tokens": self.zeros(1)}

    @torch.no_grad()
    def step(self, index: int) -> None:
        sample = self.sample(index)
        device = self.model.device
        ids = torch.tensor(sample.ids, device=device)
        targets = torch.tensor(sample.targets, device=device)
        spans = [span for answer, span in zip(sample.answers, sample.needles, strict=True) for _ in answer]
        first, end = torch.tensor(spans, device=device).T
        found: dict[int, Tensor] = {}

        def attend(layer, query, key, value, scale):
            strongest = weights_of(query, key, targets - 1, scale)[0].argmax(-1)  # [num_q_heads, targets]
            hits = (strongest >= first) & (strongest < end) & (ids[strongest] == ids[targets])
            found[layer] = hits.sum(-1)
            return causal(query, key, value, scale)

        with probe(self.model, attend):
            self.model(ids[None], use_cache=False, logits_to_keep=1)
        self.state["hits"] += torch.stack([found[layer] for layer in range(self.layers)]).double().cpu()
        self.state["tokens"] += len(sample.targets)

    def scores(self) -> np.ndarray:
        rates = self.state["hits"] / self.state["tokens"]
        return rates.unflatten(1, (self.kv_heads, -1)).amax(-1).numpy()


METHOD = Retrieval
