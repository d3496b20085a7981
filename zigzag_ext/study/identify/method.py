"""What a method is: a number of steps that add to a state of arrays, and scores read off that state in the end.

Step i depends on the settings, i and the state only. So a run can stop after any step and go on later to the same result.
"""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...planning.layers import kv_sources
from ...planning.native import native_windows
from ...planning.origin import origin_of
from ..evaluate.haystack import Sample
from ..evaluate.scoring import check_length
from . import data


@dataclass(frozen=True)
class Settings:
    """What every method takes; see `zigzag_ext.identify`."""

    seed: int
    sink: int
    window: int
    tokens: int
    prompts: int

    def __post_init__(self):
        for name, least in (("sink", 0), ("window", 1), ("tokens", 1), ("prompts", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.tokens <= self.sink + self.window:
            raise ValueError(
                f"prompts of {self.tokens} tokens tell nothing about streaming with sink {self.sink} and window {self.window}: "
                f"they need more than {self.sink + self.window} tokens"
            )


class Method(ABC):
    """Base of all methods. `state` maps names to arrays or tensors; the driver saves and restores them."""

    TOKENS, PROMPTS = 2048, 16  # defaults

    def __init__(self, model: nn.Module, tokenizer, settings: Settings):
        check_length(model, settings.tokens)
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.native = native_windows(model.config)
        self.layers = self.native.count(None)  # with full attention and keys of their own: those that a plan chooses for
        # Of each layer with full attention, as `probe` numbers them, the one of these whose keys it attends.
        full = [layer for layer, window in enumerate(self.native) if window is None]
        self.rows = [full.index(source) for source in kv_sources(model.config) if source in full]
        geometry = origin_of(model.config)
        self.q_heads, self.kv_heads = geometry["query_heads"], geometry["kv_heads"]
        self.steps = settings.prompts
        self.state: dict[str, Tensor] = {}

    @abstractmethod
    def step(self, index: int) -> None:
        """Does step `index` of `self.steps`, or nothing if the state shows that it is not needed; adds to `self.state`."""

    @abstractmethod
    def scores(self) -> np.ndarray:
        """float64 [full-attention layers, kv_heads] in [0, 1], after all steps."""

    def sample(self, number: int, tokens: int | None = None) -> Sample:
        rng = random.Random(f"identify/{self.settings.seed}/{number}")
        return data.sample(self.tokenizer, tokens or self.settings.tokens, rng)

    def by_row(self, values: np.ndarray) -> list[np.ndarray]:
        """From values [len(self.rows), ...] of layers those [n, ...] of the n that attend the keys of each of `self.layers`."""
        return [values[np.array(self.rows) == row] for row in range(self.layers)]

    def zeros(self, *shape: int) -> Tensor:
        """Float64 on the CPU, so that sums neither round nor depend on the device."""
        return torch.zeros(shape, dtype=torch.float64)


def weights_of(query: Tensor, key: Tensor, positions: Tensor, scale: float) -> Tensor:
    """Causal attention weights of some queries over all keys, computed in float32.

    query [batch, num_q_heads, n, head_dim], key [batch, num_kv_heads, n, head_dim], positions [rows] of the queries wanted.
    Returns [batch, num_q_heads, rows, n].
    """
    grouped = query[:, :, positions].unflatten(1, (key.shape[1], -1)).float()
    logits = grouped @ key[:, :, None].float().transpose(-1, -2) * scale
    future = torch.arange(key.shape[2], device=key.device) > positions[:, None]
    return logits.masked_fill(future, -torch.inf).softmax(-1).flatten(1, 2)
