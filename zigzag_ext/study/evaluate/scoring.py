"""Answers scored from one prefill forward each: exact match and log-probability, under any plan."""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from ...cache import ZigzagCache
from ...cache.compression import PromptCompression
from ...hf import zigzag
from ...hf.cache_argument import cache_argument
from ...planning.kv_format import PLAIN
from ...planning.layers import text_config
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
def attention_of(model: nn.Module, plan: Plan | None, compress: PromptCompression | None = None, compile: bool = False):
    """The model with the attention of a plan, or its own for None. compress, compile: as in `zigzag_ext.enable`.

    compress needs a plan; compile is for decode steps.
    """
    if plan is None:
        if compress is not None:
            raise ValueError(f"compress={compress} needs a plan: without one, the model keeps its own attention")
        yield model
    elif isinstance(plan, Plan):
        with zigzag(model, plan, compress=compress, compile=compile):
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
    compress: PromptCompression | None = None,
) -> list[Verdict]:
    """Teacher-forced verdicts, in the order of the samples.

    Greedy decoding would answer a sample exactly if and only if every target is the likeliest token given the true ones before
    it, because prefill and decode attend to the same keys under every plan. So one forward gives the exact match as well; two
    where prompts are compressed, one for the prompts and one for what follows.

    Args:
        batch_tokens: tokens per forward; samples of one length share a batch. None: 4096 on a CPU, 65536 on a GPU.
        advance: called with the number of samples done, after every batch.
        compress: thins each prompt out before it is answered, as in `zigzag_ext.enable`; needs a plan.

    Raises:
        ValueError: a sample is longer than the model's context; plan and model do not fit; what `zigzag_ext.enable` raises.
    """
    return score_each(model, samples, plan, [compress], batch_tokens, advance)[0]


@torch.no_grad()
def score_each(
    model: nn.Module,
    samples: Sequence[Sample],
    plan: Plan | None,
    methods: Sequence[PromptCompression | None],
    batch_tokens: int | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> list[list[Verdict]]:
    """`score` with each of the compressions in turn; prompts are read once for all of them."""
    check_length(model, max((len(sample.ids) for sample in samples), default=0))
    verdicts: list[dict[int, Verdict]] = [{} for _ in methods]
    compressed = [method for method in methods if method is not None]
    with attention_of(model, plan, compressed[0] if compressed else None):
        for indices in _batches(samples, functools.partial(batch_rows, model, batch_tokens), bool(compressed)):
            batch = [samples[index] for index in indices]
            for number, logits in _logits(model, batch, plan, methods):
                verdicts[number].update(zip(indices, _verdicts(model, batch, logits), strict=True))
            advance(len(indices))
    return [[found[index] for index in range(len(samples))] for found in verdicts]


def check_length(model: nn.Module, tokens: int) -> None:
    """Raises ValueError if the model's context is shorter than `tokens`."""
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(f"{tokens} tokens are more than the model's context of {limit}")


def batch_rows(model: nn.Module, batch_tokens: int | None, length: int) -> int:
    """Samples of `length` tokens per forward: at most `batch_tokens` tokens (None: the device's default), at least one sample."""
    if batch_tokens is None:
        batch_tokens = _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cpu"])
    return max(batch_tokens // length, 1)


def _batches(samples: Sequence[Sample], rows_of: Callable[[int], int], by_prompt: bool) -> list[list[int]]:
    """Indices of samples of one length, at most `rows_of(length)` at a time. by_prompt: their prompts have one length, too."""
    by_length: dict[tuple[int, int], list[int]] = {}
    for index, sample in enumerate(samples):
        by_length.setdefault((len(sample.ids), sample.prompt if by_prompt else 0), []).append(index)
    batches = []
    for (length, _), indices in by_length.items():
        rows = rows_of(length)
        batches += [indices[first : first + rows] for first in range(0, len(indices), rows)]
    return batches


def _first_target(samples: list[Sample]) -> int:
    return min(min(sample.targets) for sample in samples)


def _logits(
    model: nn.Module, samples: list[Sample], plan: Plan | None, methods: Sequence[PromptCompression | None]
) -> Iterator[tuple[int, Tensor]]:
    """The number of each method and logits [batch, tokens, vocab] under it, of tokens from the one before the first target on.

    Logits of position p - 1 predict token p; the rest of the vocabulary rows is never computed.
    """
    ids = torch.tensor([sample.ids for sample in samples], device=model.device)
    first, compressed = _first_target(samples), [(i, method) for i, method in enumerate(methods) if method is not None]
    if compressed:
        prompt, cache_for = samples[0].prompt, max((method for _, method in compressed), key=lambda method: method.observe)
        read = ZigzagCache(model.config, plan, ids.shape[1], compress=cache_for)
        before = model(ids[:, :prompt], **cache_argument(model, read), logits_to_keep=1).logits
        for number, method in compressed:
            cache = read if number == compressed[-1][0] else copy.deepcopy(read)
            cache.compress(method)
            after = model(ids[:, prompt:], **cache_argument(model, cache)).logits
            yield number, torch.cat([before, after], 1)[:, first - prompt :]
    for number in [number for number, method in enumerate(methods) if method is None]:
        cache = {"use_cache": False}
        if plan is not None and not plan.kv_format == plan.ring_kv_format == PLAIN:  # what is not cached is not quantised
            cache = cache_argument(model, ZigzagCache(model.config, plan, ids.shape[1]))
        yield number, model(ids, **cache, logits_to_keep=ids.shape[1] - first + 1).logits


def _verdicts(model: nn.Module, samples: list[Sample], logits: Tensor) -> list[Verdict]:
    ids = torch.tensor([sample.ids for sample in samples], device=model.device)
    first, found = _first_target(samples), []
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
