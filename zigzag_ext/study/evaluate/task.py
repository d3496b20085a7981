"""What all tasks share: a grid of lengths and depths, seeded samples, one row per cell."""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from ...cache.compression import PromptCompression
from ...planning.native import native_windows, whole_plan
from ...planning.plan import Plan
from ..weights import weights_of
from .haystack import Sample
from .results import Row, kinds_of, statistics
from .scoring import check_length, score


@dataclass(frozen=True)
class Task:
    """An evaluation task. Calling it evaluates a model under a plan:

        rows = zz.evaluate.passkey(model, tokenizer, plan, lengths=[1024, 4096], depths=[0.1, 0.5, 0.9], prompts=20)

    Deterministic: a sample depends on the task, its length, depth and number, and the seed, never on other samples or the plan.
    """

    name: str
    build: Callable[..., Sample]  # (tokenizer, length, depth, rng) -> Sample
    has_depth: bool = True

    def samples(
        self, tokenizer, length: int, depths: Sequence[float | None], prompts: int, seed: int = 0, *, start: int = 0
    ) -> list[Sample]:
        """`prompts` samples of exactly `length` tokens per depth, all of a depth in a row, numbered from `start`."""
        return list(_samples(self, tokenizer, length, tuple(depths), prompts, seed, start))

    def __call__(
        self,
        model: nn.Module,
        tokenizer,
        plan: Plan | None = None,
        *,
        lengths: Sequence[int] = (1024, 2048, 4096),
        depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
        prompts: int = 10,
        seed: int = 0,
        name: str | None = None,
        pooled: bool = False,
        batch_tokens: int | None = None,
        compress: PromptCompression | None = None,
        advance: Callable[[int], None] = lambda samples: None,
    ) -> list[Row]:
        """Evaluates, offline, one prefill forward per batch of samples.

        Args:
            plan: runs on the zigzag kernels; None is the model as it is (full attention).
            lengths: tokens per sample, answer included.
            depths: places of the needle, 0 first and 1 last; unused by tasks without needles.
            prompts: samples per length and depth.
            name: of the plan, for the rows.
            pooled: one row per length, over all depths, instead of one per length and depth.
            batch_tokens: tokens per forward; None: 4096 on a CPU, 65536 on a GPU.
            compress: thins each prompt out before it is answered, as in `zigzag_ext.enable`; needs a plan.
            advance: called with the number of samples done, after every batch.

        Raises:
            ValueError: a length is too short for the task or longer than the model's context; what `zigzag_ext.enable` raises.
        """
        if prompts < 1:
            raise ValueError(f"prompts must be at least 1, got {prompts}")
        check_length(model, max(lengths))
        described = describe(model) | describe_plan(plan, name, model, compress)
        grid = list(depths) if self.has_depth else [None]
        rows = []
        for length in lengths:
            samples = self.samples(tokenizer, length, grid, prompts, seed)
            verdicts = score(model, samples, plan, batch_tokens, advance, compress)
            groups = [(None, verdicts)] if pooled else [(d, verdicts[i * prompts :][:prompts]) for i, d in enumerate(grid)]
            rows += [
                Row(
                    **described,
                    task=self.name,
                    length=length,
                    depth=depth,
                    seed=seed,
                    **statistics(group),
                )
                for depth, group in groups
            ]
        return rows


@functools.lru_cache(maxsize=16)  # many plans are asked the same: building prompts would take as long as a GPU needs to answer
def _samples(task: Task, tokenizer, length: int, depths: tuple, prompts: int, seed: int, start: int) -> tuple[Sample, ...]:
    numbered = [(depth, number) for depth in depths for number in range(start, start + prompts)]
    rng = lambda depth, number: random.Random(f"{task.name}/{length}/{depth}/{number}/{seed}")  # noqa: E731
    return tuple(task.build(tokenizer, length, depth, rng(depth, number)) for depth, number in numbered)


def describe(model: nn.Module) -> dict[str, str]:
    """The columns that name a model: the last part of where it was loaded from, its device, its dtype and quantised weights."""
    source = str(model.config._name_or_path).rstrip("/").rpartition("/")[2]
    dtype = str(model.dtype)[6:] + weights_of(model)
    return {"model": source or model.config.model_type, "device": model.device.type, "dtype": dtype}


def describe_plan(
    plan: Plan | None, name: str | None, model: nn.Module, compress: PromptCompression | None = None
) -> dict[str, str | int]:
    """The columns that name a plan, None being the model as it is, and the compression of prompts.

    Raises ValueError for streaming layers of several sizes.
    """
    if plan is not None and any(
        plan.size(layer) != (plan.sink, plan.window) for layer in plan.streaming_layers + plan.mixed_layers
    ):
        raise ValueError("a row of results names one sink and window; streaming layers of the plan have sizes of their own")
    sizes = {"sink": getattr(plan, "sink", 0), "window": getattr(plan, "window", 0), "compress": str(compress or "")}
    kinds = kinds_of(whole_plan(native_windows(model.config)) if plan is None else plan)
    return {"plan": name or ("full" if plan is None else "plan"), "kinds": kinds, **sizes}
