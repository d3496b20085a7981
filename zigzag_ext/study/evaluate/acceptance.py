"""How many drafted tokens a model keeps on the prompts of a task: speculative decoding, run as a user runs it."""

from collections.abc import Sequence

import torch
from torch import nn

from ...hf import zigzag
from ...planning.plan import Plan
from ...speculation import Report, speculate
from .haystack import Sample


@torch.no_grad()
def accepted(
    model: nn.Module,
    samples: Sequence[Sample],
    plan: Plan | None,
    draft: str,
    new_tokens: int,
    compile: bool = False,
    compress=None,
) -> Report:
    """Continues each sample from its first target on by `new_tokens` greedy tokens, one row at a time; the sum of all reports.

    plan: None: every layer keeps every token, and so whatever `compress` says. draft: as in `zigzag_ext.speculate`. compile,
    compress: as in `zigzag_ext.enable`.

    Raises:
        ValueError: there are no samples; what `zigzag_ext.speculate` and `zigzag_ext.enable` raise.
    """
    if not samples:
        raise ValueError("acceptance is measured on one sample or more, got none")
    reports = []
    with zigzag(model, plan, compile=compile, compress=None if plan is None else compress):
        for sample in samples:
            speculation = speculate(draft)
            ids = torch.tensor([sample.ids[: min(sample.targets)]], device=model.device)
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0,
                custom_generate=speculation,
            )  # fmt: skip
            reports.append(speculation.report)
    return sum(reports[1:], reports[0])
