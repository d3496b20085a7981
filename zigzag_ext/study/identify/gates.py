"""gates: a trained gate per KV head (or per layer) between full and streaming attention; the rest of the model stays frozen.

Source: DuoAttention (https://arxiv.org/abs/2410.10819, section 2.3; schedule and loss as in its code). The student's attention is
gate * full + (1 - gate) * streaming, where the full attention is that of the unchanged model. The loss is the mean squared
difference of the last hidden states over the tokens of questions and answers, plus `regularizer` * mean |gate|. AdamW at
`learning_rate` without decay, warmed up over the first fifth of the steps and lowered over the last one, to a tenth. Gates start
at 1 and are clamped to [0, 1]. One gate per layer is the calibration of LoZA (https://arxiv.org/abs/2512.23966). Deviations:
shorter prompts with other needles (see `data`), fewer steps, and streaming attention with this package's rule for the window.

Full attention is torch's, streaming attention is computed per block of queries: nothing of size n x n is stored.
"""

import numpy as np
import torch
from torch import Tensor

from ..probe import probe
from ..torch_attention import banded, causal
from .method import Method, Settings

_LENGTHS = 8  # prompts have lengths from half of `tokens` to all of it, in as many steps


class Gates(Method):
    TOKENS, PROMPTS = 1024, 200

    def __init__(
        self,
        model,
        tokenizer,
        settings: Settings,
        level: str = "head",
        learning_rate: float = 0.02,
        regularizer: float = 0.05,
        batch: int = 1,
    ):
        if level not in ("layer", "head"):
            raise ValueError(f"level must be 'layer' or 'head', got {level!r}")
        for name, value in (("learning_rate", learning_rate), ("regularizer", regularizer), ("batch", batch)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        super().__init__(model, tokenizer, settings)
        self.learning_rate, self.regularizer, self.batch = learning_rate, regularizer, batch
        shape = (self.layers, self.kv_heads if level == "head" else 1)
        self.gates = torch.ones(shape, device=model.device, requires_grad=True)
        self.optimizer = torch.optim.AdamW([self.gates], lr=learning_rate, weight_decay=0.0)
        moments = {name: torch.zeros(shape, device=model.device) for name in ("exp_avg", "exp_avg_sq")}
        self.optimizer.state[self.gates] = {"step": torch.tensor(0.0), **moments}
        self.state = {"gates": self.gates, **self.optimizer.state[self.gates]}

    def step(self, index: int) -> None:
        ids, first = self._prompts(index)
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * _schedule(index, self.steps)
        try:
            self.model.requires_grad_(False)
            full, wanted = self._teacher(ids, first)
            with torch.enable_grad():
                distance = (self._student(ids, first, full) - wanted).float().square().mean()
                loss = distance + self.regularizer * self.gates.abs().mean()
                self.optimizer.zero_grad()
                loss.backward()
        finally:
            for weight in weights:
                weight.requires_grad_(True)
        self.optimizer.step()
        with torch.no_grad():
            self.gates.clamp_(0.0, 1.0)

    def scores(self) -> np.ndarray:
        gates = self.gates.detach().double().cpu().numpy()
        return np.broadcast_to(gates, (self.layers, self.kv_heads)).copy()

    def _prompts(self, index: int) -> tuple[Tensor, int]:
        """Token ids [batch, n] of one length, and the first position that the loss counts: where the first question begins."""
        least = max(self.settings.tokens // 2, self.settings.sink + self.settings.window + 1)
        length = least + (self.settings.tokens - least) * (index * 5 % _LENGTHS + 1) // _LENGTHS  # 5: all lengths, mixed
        samples = [self.sample(index * self.batch + row, length) for row in range(self.batch)]
        first = min(answer[0] for sample in samples for answer in sample.answers)
        return torch.tensor([sample.ids for sample in samples], device=self.model.device), first

    @torch.no_grad()
    def _teacher(self, ids: Tensor, first: int) -> tuple[list[Tensor], Tensor]:
        """The unchanged model: attention outputs of every layer, and last hidden states from `first` on."""
        outputs: list[Tensor] = []

        def attend(layer, query, key, value, scale):
            outputs.append(causal(query, key, value, scale))
            return outputs[-1]

        with probe(self.model, attend):
            hidden = self.model.base_model(ids, use_cache=False).last_hidden_state
        return outputs, hidden[:, first:]

    def _student(self, ids: Tensor, first: int, full: list[Tensor]) -> Tensor:
        sink, window = self.settings.sink, self.settings.window

        def attend(layer, query, key, value, scale):
            gate = (
                self.gates[self.rows[layer]].expand(self.kv_heads).repeat_interleave(self.q_heads // self.kv_heads)[:, None, None]
            )
            streaming = banded(query, key, value, scale, sink, window)
            return (gate * full[layer] + (1.0 - gate) * streaming).to(query.dtype)

        with probe(self.model, attend):
            return self.model.base_model(ids, use_cache=False).last_hidden_state[:, first:]


def _schedule(index: int, steps: int) -> float:
    """Learning rate of a step as a share of the largest: up over the first fifth of the steps, down over the last."""
    fifth = 0.2 * steps
    return max(min(1.0, (index + 1) / fifth, (steps - index) / fifth), 0.1)


METHOD = Gates
