"""Answers scored from one prefill forward each: exact match and log-probability, under any plan."""

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from ...cache import ZigzagCache
from ...hf import zigzag
from ...hf.cache_argument import cache_argument
from ...planning.kv_format import PLAIN
from ...planning.plan import Plan
from .haystack import Sample

_BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}  # a GPU needs this many to be busy


@dataclass(frozen=True)
class Verdict:
    """What the model made of one sample."""

    exact: bool  # every target token was the likeliest one
    logprob: float  # natural log-probability of the target tokens, mean per token
    answers: tuple[float, ...]  # the same of each answer


@contextmanager
def attention_of(model: nn.Module, plan: Plan | None):
    """The model with the attention of a plan, or its own for None."""
    if plan is None:
        yield model
    elif isinstance(plan, Plan):
        with zigzag(model, plan):
            yield model
    else:
        raise TypeError(f"plan must be a Plan or None, got {plan!r}")


@torch.no_grad()
def score(
    model: nn.Module,
    samples: Sequence[Sample],
    plan: Plan | None = None,
    batch_tokens: int | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> list[Verdict]:
    """Teacher-forced verdicts, in the order of the samples.

    Greedy decoding would answer a sample exactly if and only if every target is the likeliest token given the true ones before
    it, because prefill and decode attend to the same keys under every plan. So one forward gives the exact match as well.

    Args:
        batch_tokens: tokens per forward; samples of one length share a batch. None: 4096 on a CPU, 65536 on a GPU.
        advance: called with the number of samples done, after every batch.

    Raises:
        ValueError: a sample is longer than the model's context; plan and model do not fit; what `zigzag_ext.enable` raises.
    """
    check_length(model, max((len(sample.ids) for sample in samples), default=0))
    verdicts: dict[int, Verdict] = {}
    with attention_of(model, plan):
        for indices in _batches(samples, functools.partial(batch_rows, model, batch_tokens)):
            found = _score_batch(model, [samples[index] for index in indices], plan)
            verdicts.update(zip(indices, found, strict=True))
            advance(len(indices))
    return [verdicts[index] for index in range(len(samples))]


def check_length(model: nn.Module, tokens: int) -> None:
    """Raises ValueError if the model's context is shorter than `tokens`."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"{tokens} tokens are more than the model's context of {limit}")


def batch_rows(model: nn.Module, batch_tokens: int | None, length: int) -> int:
    """Samples of `length` tokens per forward: at most `batch_tokens` tokens (None: the device's default), at least one sample."""
    if batch_tokens is None:
        batch_tokens = _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cpu"])
    return max(batch_tokens // length, 1)


def _batches(samples: Sequence[Sample], rows_of: Callable[[int], int]) -> list[list[int]]:
    """Indices of samples of one length, at most `rows_of(length)` at a time."""
    by_length: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        by_length.setdefault(len(sample.ids), []).append(index)
    batches = []
    for length, indices in by_length.items():
        rows = rows_of(length)
        batches += [indices[first : first + rows] for first in range(0, len(indices), rows)]
    return batches


def _score_batch(model: nn.Module, samples: list[Sample], plan: Plan | None) -> list[Verdict]:
    ids = torch.tensor([sample.ids for sample in samples], device=model.device)
    first = min(min(sample.targets) for sample in samples)
    kept = ids.shape[1] - first + 1  # logits of position p - 1 predict token p; the rest of the vocabulary rows is never computed
    cache = {"use_cache": False}
    if plan is not None and not plan.kv_format == plan.ring_kv_format == PLAIN:  # what is not cached is not quantised
        cache = cache_argument(model, ZigzagCache(model.config, plan, ids.shape[1]))
    logits = model(ids, **cache, logits_to_keep=kept).logits
    found = []
    for row, sample in enumerate(samples):
        targets = torch.tensor(sample.targets, device=model.device)
        chosen = logits[row, targets - first].float()
        truth = ids[row, targets]
        logprobs = chosen.log_softmax(-1).gather(1, truth[:, None])[:, 0].double()
        answers = [part.mean() for part in logprobs.split([len(answer) for answer in sample.answers])]
        found += [(chosen.argmax(-1) == truth).all().double(), logprobs.mean(), *answers]
    values = iter(torch.stack(found).tolist())  # the one transfer of a batch
    verdicts = [Verdict(bool(next(values)), next(values), tuple(islice(values, len(sample.answers)))) for sample in samples]
    if any(math.isnan(verdict.logprob) for verdict in verdicts):
        raise ValueError(f"the model's log-probabilities are NaN in {str(model.dtype)[6:]}; try bfloat16 or float32")
    return verdicts
