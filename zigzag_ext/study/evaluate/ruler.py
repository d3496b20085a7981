"""RULER's tasks that need no network, through lm-evaluation-harness: its prompts, its generation, its score. `pip install
'zigzag_ext[ruler]'`.

The other tasks of RULER download essays, SQuAD or HotpotQA: `zigzag lm-eval --model zigzag` runs them. Source: RULER
(https://arxiv.org/abs/2404.06654), as in lm_eval/tasks/ruler.
"""

import contextlib
import functools
import io
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from unittest import mock

import numpy as np
from torch import nn

from ...cache.compression import PromptCompression
from ...planning.plan import Plan
from ..lm_eval import register, require_lm_eval
from .results import Row, wilson
from .scoring import attention_of, batch_rows, check_length
from .task import describe, describe_plan

_SAMPLES = 500  # that lm-eval makes per length, whatever the number that is asked


@dataclass(frozen=True)
class RulerTask:
    """An evaluation task like `Task`, named as in lm-eval. The model generates, with greedy search; the score of a prompt is the
    share of the expected strings that its answer contains. Rows carry the mean score as `exact`, with Wilson's interval (wide
    enough: scores in [0, 1] vary at most as much as hits and misses of the same mean), and no log-probability (NaN)."""

    name: str
    has_depth = False  # prompts hide their needles anywhere

    def __call__(
        self,
        model: nn.Module,
        tokenizer,
        plan: Plan | None = None,
        *,
        lengths: Sequence[int] = (1024, 2048, 4096),
        depths: Sequence[float] = (),
        prompts: int = 10,
        seed: int = 0,
        name: str | None = None,
        pooled: bool = False,
        batch_tokens: int | None = None,
        compress: PromptCompression | None = None,
        advance: Callable[[int], None] = lambda samples: None,
        compile: bool = False,
    ) -> list[Row]:
        """Evaluates, offline. Prompts are as long as `lengths` allows, answer included; `depths` and `pooled` change nothing.

        compile: decode steps, as in `zigzag_ext.enable`; full attention (plan None) is the model's own, and stays eager.

        Raises:
            ModuleNotFoundError: lm_eval is not installed. ValueError: `prompts` is not in 1 .. 500, a length is longer than the
            model's context or too short for the task; what `zigzag_ext.enable` raises.
        """
        require_lm_eval()
        if not 1 <= prompts <= _SAMPLES:
            raise ValueError(f"prompts of {self.name} must be 1 to {_SAMPLES}, got {prompts}")
        check_length(model, max(lengths))
        described = describe(model) | describe_plan(plan, name, model, compress)
        rows = []
        for length in lengths:
            scores = self._scores(model, tokenizer, plan, length, prompts, seed, batch_tokens, compress, advance, compile)
            share = fmean(scores)
            low, high = wilson(sum(scores), len(scores))
            rows.append(
                Row(
                    **described,
                    task=self.name,
                    length=length,
                    depth=None,
                    seed=seed,
                    prompts=len(scores),
                    exact=share,
                    exact_low=low,
                    exact_high=high,
                    **dict.fromkeys(("logprob", "logprob_low", "logprob_high"), math.nan),
                )
            )
        return rows

    def _scores(self, model, tokenizer, plan, length, prompts, seed, batch_tokens, compress, advance, compile) -> list[float]:
        """Of each prompt, in their order."""
        task = _load(self.name, tokenizer, length, seed)
        rows = batch_rows(model, batch_tokens, length)
        with _quiet():
            task.build_all_requests(limit=prompts, rank=0, world_size=1)
            network = register()(model, tokenizer=tokenizer, batch_size=rows)
        requests = task.instances
        longest = max(len(tokenizer(request.args[0])["input_ids"]) + request.args[1]["max_gen_toks"] for request in requests)
        check_length(model, longest)  # ruler_fwe has prompts that are longer than asked
        scores = []
        with attention_of(model, plan, compress, compile):
            for first in range(0, len(requests), rows):
                batch = requests[first : first + rows]
                answers = network.generate_until(batch, disable_tqdm=True)
                pairs = zip(batch, answers, strict=True)
                scores += [task.process_results(request.doc, [answer])[str(length)] for request, answer in pairs]
                advance(len(batch))
        return scores


_NAMES = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
RULER = {name: RulerTask(name) for name in _NAMES}


@functools.lru_cache(maxsize=16)  # many plans are asked the same; making 500 prompts takes seconds
def _load(name: str, tokenizer, length: int, seed: int):
    """lm-eval's task with its prompts, which depend on the arguments only."""
    with tempfile.TemporaryDirectory() as scratch, _quiet(), _offline(), _seeded(seed):
        import lm_eval.tasks

        folder = Path(lm_eval.tasks.__file__).parent / "ruler"
        tokenizer.save_pretrained(scratch)  # lm-eval loads it by name
        sizes = {"max_seq_lengths": [length], "tokenizer": scratch}
        manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False, metadata=sizes)
        sys.modules.pop("lm_eval.tasks.ruler.cwe_utils", None)  # it draws from a generator of its own: made anew with the module
        return manager.load_task_or_group([name])[name]


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """lm-eval fetches a model that splits sentences when it is imported; only the tasks made of essays use it."""
    import nltk

    with mock.patch.object(nltk, "download", lambda *_, **__: False):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's notes and bars, one per prompt that it makes. What goes wrong is raised all the same."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators that lm-eval draws from, put back afterwards."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
