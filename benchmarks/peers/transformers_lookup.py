"""transformers' own lookup of drafts (`prompt_lookup_num_tokens`), eager and for one row, as `generate()` runs it.

Drafts are random tokens, of which each is taken for right with a given chance, as in benchmarks.speculate.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.candidate_generator import CandidateGenerator

from zigzag_ext.hf.cache_argument import cache_argument

from ..cells.fake_context import fake_dynamic


class InjectedLookup(CandidateGenerator, LogitsProcessor):
    """In the place of the generator that looks up drafts, and behind the logits of every position that they are verified at."""

    def __init__(self, tokens: int, chance: float, vocab_size: int):
        self.tokens, self.chance, self.vocab_size = tokens, chance, vocab_size
        self.rounds = self.start = 0
        self.drafted: list[int] = []

    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, None]:
        self.rounds, self.start = self.rounds + 1, input_ids.shape[1]
        self.drafted = [random.randrange(self.vocab_size) for _ in range(self.tokens)]
        return torch.cat([input_ids, input_ids.new_tensor([self.drafted])], 1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int) -> None:
        pass

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits [1, vocab] behind input_ids, which the drafted token tops if it is taken for right."""
        at = input_ids.shape[1] - self.start
        if at < len(self.drafted) and random.random() < self.chance:
            scores[:, self.drafted[at]] = torch.inf
        return scores


class LookupPeer:
    """A stock model and its cache of `context` tokens of random contents."""

    def __init__(self, model, context: int):
        self.model, self.cache = model, fake_dynamic(model, context)
        self.ids = torch.randint(0, model.config.vocab_size, (1, context + 1), device=model.device)

    def generate(self, new_tokens: int, tokens: int, chance: float, timed: Callable[[Callable], float]) -> tuple[int, float]:
        """Rounds and milliseconds of a call with drafts of `tokens` tokens that goes on where the last one stopped."""
        lookup = InjectedLookup(tokens, chance, self.model.config.vocab_size)
        self.model._get_candidate_generator = lambda **kwargs: lookup
        options = cache_argument(self.model, self.cache) | {"do_sample": False, "eos_token_id": None}
        options |= {"attention_mask": torch.ones_like(self.ids), "max_new_tokens": new_tokens}
        options |= {"logits_processor": [lookup], "prompt_lookup_num_tokens": tokens}

        def call():
            self.ids = self.model.generate(self.ids, **options)

        try:
            ms = timed(call)
            return lookup.rounds, ms
        finally:
            del self.model._get_candidate_generator
