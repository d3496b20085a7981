"""greedy: backward elimination. From full attention on, the layer that answers miss least begins to stream, until one is left.

In each round the cost of a layer is what the answers' mean log-probability per token loses when it streams too, beside those that
stream already; the cheapest one (among equals the lowest) begins to stream. Scores are the order: 0 for the first layer to
stream, 1 for the last, in equal steps. So `solve` with objective "mean" lets exactly the first ones stream, at every ratio, and
the sets are nested. Layers that back each other up cost nothing one at a time and much together: only a method that keeps
earlier choices in force sees it.

What it finds is no optimum: no choice is taken back. And all choices are made on the same prompts, so few prompts are fitted
rather than learned from: with two of 1024 tokens, the first 15 of SmolLM2-135M's 30 layers gained 0.07 on these two and lost
0.08 on two others, per token. Give it as many prompts as there is time for.

Lazy evaluation (Minoux' accelerated greedy, 1978): a round measures layers in the order of their last known costs, until the
cheapest measured one is no dearer than any of those last known costs. This gives what measuring all of them would give if costs
never fall as more layers stream. Backups obey that; two layers of which each is useless without the other do not, and such a
layer is found late. `exhaustive=True` assumes nothing: layers * (layers + 1) / 2 measurements (465 for 30 layers).

The criterion is this package's own. NLL-guided selection (https://arxiv.org/abs/2606.27791) also ranks layers by the answers'
log-probability, but one at a time, by the gain when a single layer becomes full (this package's reading of its abstract).
"""

from itertools import accumulate

import numpy as np

from .answers import Answers
from .method import Settings


class Greedy(Answers):
    """Step 0 measures full attention. A round with n layers left has n steps, and those that lazy evaluation saves do nothing."""

    def __init__(
        self,
        model,
        tokenizer,
        settings: Settings,
        keep: int = 1,
        exhaustive: bool = False,
        batch_tokens: int | None = None,
    ):
        super().__init__(model, tokenizer, settings, batch_tokens)
        if not 1 <= keep < self.layers:
            raise ValueError(f"keep must lie between 1 and {self.layers - 1}, one less than the model's layers, got {keep}")
        self.exhaustive = exhaustive
        self.last_steps = list(accumulate(range(self.layers, keep, -1)))  # of each round
        self.steps = 1 + self.last_steps[-1]
        self.state = {
            "logprob": self.zeros(1),  # with the layers chosen so far streaming
            "cost": self.zeros(self.layers) - np.inf,  # last known; natural log-probability per token
            "measured": self.zeros(self.layers) - 1,  # the round of that cost
            "chosen": self.zeros(self.layers) - 1,  # the round in which the layer began to stream
        }

    def step(self, index: int) -> None:
        if index == 0:
            self.state["logprob"][0] = self._logprob_without(self._chosen())
            return
        chosen = self._chosen()
        layer = self._to_measure()
        if layer is not None:
            self.state["cost"][layer] = self.state["logprob"][0] - self._logprob_without([*chosen, layer])
            self.state["measured"][layer] = len(chosen)
        if index == self.last_steps[len(chosen)]:
            cheapest = self._cheapest(self._left(measured=True))
            self.state["chosen"][cheapest] = len(chosen)
            self.state["logprob"] -= self.state["cost"][cheapest]

    def scores(self) -> np.ndarray:
        """Layers that were never chosen (`keep`) come last, by their last known costs."""
        rest = sorted(set(range(self.layers)) - set(self._chosen()), key=self._dearness)
        places = np.empty(self.layers)
        places[[*self._chosen(), *rest]] = np.linspace(0.0, 1.0, self.layers)
        return np.repeat(places[:, None], self.kv_heads, axis=1)

    def _to_measure(self) -> int | None:
        """The layer to measure next in this round; None if the cheapest one is known."""
        fresh, stale = self._left(measured=True), self._left(measured=False)
        if not stale:
            return None
        nearest = self._cheapest(stale)
        known = fresh and self._dearness(self._cheapest(fresh)) < self._dearness(nearest)
        return None if known and not self.exhaustive else nearest

    def _chosen(self) -> list[int]:
        """Layers that stream, in the order in which they began to."""
        rounds = self.state["chosen"].tolist()
        return sorted((layer for layer in range(self.layers) if rounds[layer] >= 0), key=rounds.__getitem__)

    def _left(self, measured: bool) -> list[int]:
        """Retrieval layers that were, or were not, measured in this round."""
        chosen = self._chosen()
        rounds = self.state["measured"].tolist()
        return [layer for layer in range(self.layers) if layer not in chosen and (rounds[layer] == len(chosen)) == measured]

    def _dearness(self, layer: int) -> tuple[float, int]:
        return float(self.state["cost"][layer]), layer

    def _cheapest(self, layers: list[int]) -> int:
        return min(layers, key=self._dearness)

    def _logprob_without(self, streaming: list[int]) -> float:
        retrieval = np.ones((self.layers, self.kv_heads), dtype=bool)
        retrieval[streaming] = False
        return self.logprob(retrieval)


METHOD = Greedy
