"""Logits processors and stopping criteria of generate(), applied to rows of different widths and to several positions at once."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.generation import logits_process, stopping_criteria

# Judge each vector of scores by itself, whatever the tokens before it.
_ANYWHERE = tuple(
    getattr(logits_process, name)
    for name in (
        "TemperatureLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "MinPLogitsWarper",
        "TopHLogitsWarper",
        "TypicalLogitsWarper",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
    )
    if hasattr(logits_process, name)
)
# Carry something from one call to the next: a position that is judged twice, or not kept, would change what follows.
_STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")


class Processors:
    """The processors of a call. Those that look at the tokens before a position are called once per width that occurs.

    Raises:
        ValueError: a processor that keeps a state from call to call, by name.
    """

    def __init__(self, processors: Iterable):
        self.processors = list(processors)
        for processor in self.processors:
            if type(processor).__name__ in _STATEFUL:
                raise ValueError(
                    f"speculate does not serve {type(processor).__name__}, which expects every position once and in order"
                )
        self.anywhere = all(type(processor) in _ANYWHERE for processor in self.processors)

    def __bool__(self) -> bool:
        return bool(self.processors)

    def __call__(self, scores: Tensor, ids: Tensor | None, widths: list[int], counts: list[int]) -> Tensor:
        """scores [batch, q_len, vocab] float32; those of column q_len - counts[i] + j of row i are about column widths[i] + j.

        ids: [batch, columns], rows with their drafts; None where `anywhere`.
        """
        batch, q_len, vocab = scores.shape
        if not self.processors:
            return scores
        if self.anywhere:
            flat = scores.reshape(-1, vocab)
            return self._apply(flat.new_zeros(len(flat), 1, dtype=torch.long), flat).view_as(scores)
        scores = scores.clone()
        places = [(widths[row] + j, row, q_len - counts[row] + j) for row in range(batch) for j in range(counts[row])]
        for width in sorted({place[0] for place in places}):
            columns = dict(place[1:] for place in places if place[0] == width)
            index = [columns.get(row, q_len - 1) for row in range(batch)]  # rows that are not there are judged for nothing
            judged = self._apply(ids[:, :width], torch.stack([scores[row, column] for row, column in enumerate(index)]))
            for row, column in columns.items():
                scores[row, column] = judged[row]
        return scores

    def _apply(self, ids: Tensor, scores: Tensor) -> Tensor:
        for processor in self.processors:
            scores = processor(ids, scores)
        return scores


class Criteria:
    """The stopping criteria of a call. Lengths and eos tokens are judged on the host, all others once per width that occurs."""

    def __init__(self, criteria: Iterable):
        self.others, self.eos, self.most = [], set(), None
        for each in criteria:
            if type(each) is stopping_criteria.MaxLengthCriteria:
                self.most = each.max_length if self.most is None else min(self.most, each.max_length)
            elif type(each) is stopping_criteria.EosTokenCriteria:
                self.eos |= set(each.eos_token_id.flatten().tolist())
            else:
                self.others.append(each)
        # What generate() asks for: rows that are finished get padding tokens, else they go on until all are.
        self.pads = any(hasattr(each, "eos_token_id") for each in criteria)

    def first_stops(self, new: list[list[int]], ids: Tensor | None, widths: list[int]) -> list[int | None]:
        """For each row, how many of its `new` tokens come up to the first that stops it, that one included; None: none does.

        ids: [batch, columns] with the new tokens behind widths[i] earlier ones; None where there are no `others`.
        """
        stops = [self._stop_on_host(tokens, width) for tokens, width in zip(new, widths, strict=True)]
        if not self.others:
            return stops
        for width in sorted({start + n + 1 for start, tokens in zip(widths, new, strict=True) for n in range(len(tokens))}):
            verdicts = torch.stack([self._verdict(each, ids[:, :width]) for each in self.others]).any(0).tolist()
            for row, (start, tokens) in enumerate(zip(widths, new, strict=True)):
                n = width - start
                if verdicts[row] and 0 < n <= len(tokens) and (stops[row] is None or n < stops[row]):
                    stops[row] = n
        return stops

    def _stop_on_host(self, tokens: list[int], width: int) -> int | None:
        for n, token in enumerate(tokens, 1):
            if token in self.eos or (self.most is not None and width + n >= self.most):
                return n
        return None

    @staticmethod
    def _verdict(criterion, ids: Tensor) -> Tensor:
        verdict = criterion(ids, None)
        if not isinstance(verdict, Tensor):
            return torch.full((len(ids),), bool(verdict), device=ids.device)
        return verdict.to(ids.device)
