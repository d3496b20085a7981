"""lazy: a head is lazy if its last queries pay their attention to the first and the latest tokens; the score is 1 - that share.

Source: LightTransfer / SimLayerKV (https://arxiv.org/abs/2410.13846): the last 64 queries of the input, mean over queries and
heads. Deviations: scores per KV head (the mean of a row is the paper's layer score), each query with its own window, and the
plan's sink and window in the place of 4 + 1020 tokens.
"""

import numpy as np
import torch
from torch import Tensor

from ...attention.reference import visible
from ..probe import probe
from ..torch_attention import causal
from .method import Method, Settings, weights_of


class Lazy(Method):
    def __init__(self, model, tokenizer, settings: Settings, queries: int = 64):
        if not 1 <= queries <= settings.tokens:
            raise ValueError(f"queries must lie between 1 and tokens = {settings.tokens}, got {queries}")
        super().__init__(model, tokenizer, settings)
        self.positions = torch.arange(settings.tokens - queries, settings.tokens, device=model.device)
        keys = torch.arange(settings.tokens, device=model.device)
        self.seen = visible(keys, self.positions[:, None], settings.sink, settings.window)
        self.state = {"mass": self.zeros(len(self.rows), self.kv_heads)}

    @torch.no_grad()
    def step(self, index: int) -> None:
        found: dict[int, Tensor] = {}

        def attend(layer, query, key, value, scale):
            mass = (weights_of(query, key, self.positions, scale) * self.seen).sum(-1)  # [1, num_q_heads, queries]
            found[layer] = mass.mean((0, 2)).unflatten(0, (self.kv_heads, -1)).mean(1)
            return causal(query, key, value, scale)

        ids = torch.tensor([self.sample(index).ids], device=self.model.device)
        with probe(self.model, attend):
            self.model(ids, use_cache=False, logits_to_keep=1)
        self.state["mass"] += torch.stack([found[layer] for layer in range(len(self.rows))]).double().cpu()

    def scores(self) -> np.ndarray:
        scores = (1.0 - self.state["mass"] / self.steps).clamp(0.0, 1.0).numpy()
        return np.stack([group.mean(0) for group in self.by_row(scores)])


METHOD = Lazy
