"""The peers of zz.Engine in this process: generate() of an enabled model for one row, transformers' generate_batch() for many."""

import gc
from collections.abc import Iterator
from importlib.util import find_spec

import torch
import transformers
from packaging.version import Version
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.streamers import BaseStreamer

import zigzag_ext as zz

from ..cells.problem import Unsupported
from ..cells.serve_scenarios import Job
from ..timing.token_times import Times, all_decode, summary


def check_batching() -> None:
    """Raises Unsupported where transformers' continuous batching fails by itself: its metrics look for what requests have not."""
    if Version(transformers.__version__) < Version("5.6") and find_spec("opentelemetry"):
        raise Unsupported(
            f"continuous batching of transformers {transformers.__version__} fails where OpenTelemetry is installed; 5.6 does not"
        )


def sizes_of(model, job: Job) -> dict[str, int]:
    """Options of transformers' continuous batching. On a CPU it would else take nearly all of the machine's memory."""
    blocks = -(-(job.prompt + job.new) // 256) + 1  # of 256 tokens
    if model.device.type == "cpu":
        return {"num_blocks": job.rows * blocks, "max_batch_tokens": 2048}
    return {"max_blocks_per_request": blocks}


class _Clock(BaseStreamer):
    """Notes when tokens come; the first call brings the prompt."""

    def __init__(self):
        self.times, self.is_prompt = Times(), True

    def put(self, value) -> None:
        if not self.is_prompt:
            self.times.note()
        self.is_prompt = False

    def end(self) -> None:
        pass


def generate(model, plan: zz.Plan, job: Job) -> Iterator[tuple[str, dict]]:
    """One row; on a GPU by compiled steps, which are captured before. The scenario "steady" of one row."""
    compiles = model.device.type == "cuda"
    ids = torch.randint(0, model.config.vocab_size, (1, job.prompt), device=model.device)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    with zz.zigzag(model, plan, max_len=job.prompt + job.new + 1, compile=compiles):
        for _ in range(2):
            clock = _Clock()
            model.generate(ids, max_new_tokens=job.new + 1, streamer=clock, **options)
    yield "steady", summary([clock.times], all_decode([clock.times]))


def generate_batch(model, plan: zz.Plan, job: Job) -> Iterator[tuple[str, dict]]:
    """The scenario "whole". It knows no plans: every layer keeps all keys. Then the steps of it in which all rows decode.

    Where new tokens are few, the first rows end before the last ones begin, and there are no such steps.
    """
    check_batching()
    config = GenerationConfig(max_new_tokens=job.new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(**sizes_of(model, job))
    ids = torch.randint(0, model.config.vocab_size, (job.rows, job.prompt)).tolist()
    outputs = model.generate_batch(ids, config, batching, record_timestamps=True)
    done = [output for output in outputs.values() if len(output.generated_tokens) == job.new]
    if len(done) != job.rows:
        raise RuntimeError(f"generate_batch ended {len(done)} of {job.rows} requests")
    times = [Times(output.created_time, output.timestamps) for output in done]
    yield "whole", summary(times)
    start, end = all_decode(times)
    if start < end:
        yield "whole: all decode", summary(times, (start, end))
    del outputs, done
    gc.collect()
