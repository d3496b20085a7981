"""Engine: many requests at once on one model, which come and go at any time."""

import functools
import random
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..attention import smoothing
from ..attention.buffers import free_bytes
from ..cache import ZigzagCache
from ..cache.slots import Slots
from ..hf.chunking import check_chunk
from ..hf.compiled import rope_by_length
from ..hf.enable import disable, enable, given_back, served_model
from ..hf.own_config import is_composite
from ..hf.session import session_of
from ..planning.kv_format import KvFormat
from ..planning.plan import Plan, token_count
from ..planning.reading import shown
from .errors import EngineStopped
from .loop import Loop
from .pace import Pace
from .pool import Pool
from .prefixes import Prefixes, model_state
from .request import Completion, Request, Token
from .sampling import Sampling
from .scheduler import DECODING, PREFILLING, QUEUED, Scheduler
from .steps import Steps
from .text import TextStream

MAX_ROWS = 1024


def gives_back(init):
    """A constructor that enables its model: it disables it if it fails or is interrupted, at whatever line."""

    @functools.wraps(init)
    def run(self, model: nn.Module, *args, **kwargs) -> None:
        with given_back(model):
            init(self, model, *args, **kwargs)

    return run


class Engine:
    """Decodes many requests at once, each with tokens and memory of its own: requests come and go while others run.

    Args:
        model: as `enable` takes it, of text, and not enabled yet: the engine enables it, and `close` gives it back as it was.
        plan: as in `enable`; None: the model as it is.
        max_len: most tokens of a request, prompt and new ones together.
        max_rows: most requests that run at once. Streaming layers have memory for all of them from the start.
        memory: for keys and values. A float: that share of what is free on the model's device now. An int: bytes.
        max_stall_ms: how long chunks of prompts may hold up the rows that decode, in milliseconds, by what earlier chunks took.
            A chunk has at least 128 tokens, or what is left of its prompt, whatever it takes.
        prefix_cache: keep what ended requests leave, as long as its memory is not needed: a prompt that begins as an earlier one,
            or as a conversation so far, is read from there on. See below.
        compile: run decode steps as compiled graphs, as `enable` does, on a GPU captured CUDA graphs: one for every number of
            rows that is a power of two, and one for max_rows. Making the engine then takes from seconds to minutes; no step waits
            for it later. None: on a GPU.
        queue: most requests that wait until others have ended.
        tokenizer: for prompts that are strings, the text of completions, and stop strings.
        prefill_chunk: tokens of a prompt that are read at once, instead of as many as `max_stall_ms` allows ("auto").
        kv_format, ring_kv_format, key_smoothing: as in `enable`.

    A request is admitted when the memory of its prompt and of max_tokens new tokens is free, and keeps it reserved: what runs
    never runs out of memory, and is never put off. Pages are taken as tokens come. Requests are admitted in the order in which
    they come; a smaller one may overtake one that finds no memory, 16 times at most. Each step decodes all rows and then reads a
    chunk of one prompt, the one with the least left, unless another has waited for 8 steps; or of several, if they are short.

    With `prefix_cache` a prompt goes on from the longest beginning that it shares with a request that runs or has ended:
    `Completion.cached_tokens`. Where layers stream, from the end of a request, of a prompt, of 8,192 tokens each, or from where
    earlier prompts have parted; where all retrieve, from any token. Fewer than 16 tokens are read again. What is kept goes, the
    least recently used first, when its rows or bytes are needed. Requests share only with those of the same `salt`, and of the
    same weights and adapters. Where weights are written through `.data`, which torch does not notice, give another salt.

    The tokens of a request are those of `model.generate()` with the same plan, whatever runs beside it; only where two logits
    are within rounding of each other, another may be chosen. A failure ends the requests of its step and no others; only where
    their memory cannot be given back, the engine stops (`EngineStopped`).

    Use it as a context manager, or call `close()`. It is for several threads. Not served: image-text models, layers with states,
    models on several devices, and RoPE whose frequencies follow the length.

    Raises:
        TypeError, ValueError: what `enable` raises; an option is out of range; the model cannot be served, by name; or the memory
            does not hold the rings of all rows and one token.
        RuntimeError: the model is enabled already.

    Example:
        >>> with zz.Engine(model, plan, max_len=8192, tokenizer=tokenizer) as engine:
        ...     done = engine.generate(["The capital of France is", "Two and two are"], zz.Sampling(max_tokens=8))
        >>> [completion.text for completion in done]
    """

    @gives_back
    def __init__(
        self,
        model: nn.Module,
        plan: Plan | None = None,
        *,
        max_len: int,
        max_rows: int = 32,
        memory: float | int = 0.9,
        max_stall_ms: float = 50.0,
        prefix_cache: bool = True,
        compile: bool | None = None,
        queue: int = 256,
        tokenizer=None,
        prefill_chunk: int | str = "auto",
        kv_format: KvFormat | str | dict[str, str] | None = None,
        ring_kv_format: KvFormat | str | dict[str, str] | None = None,
        key_smoothing: bool | None = None,
    ):
        _between("max_rows", max_rows, 1, MAX_ROWS)
        _between("max_len", max_len, 1, 1 << 30)
        _between("queue", queue, 1, 1 << 30)
        if isinstance(max_stall_ms, bool) or not isinstance(max_stall_ms, int | float) or not max_stall_ms > 0:
            raise ValueError(f"max_stall_ms must be a number of milliseconds above 0, got {max_stall_ms!r}")
        if prefill_chunk is None:
            raise TypeError("prefill_chunk must be a number of tokens or 'auto', got None")
        if not isinstance(prefix_cache, bool):
            raise TypeError(f"prefix_cache must be True or False, got {prefix_cache!r}")
        if not isinstance(compile, bool | None):
            raise TypeError(f"compile must be True, False or None, got {compile!r}")
        compile = str(getattr(served_model(model), "device", "")).startswith("cuda") if compile is None else compile
        self.tokenizer = tokenizer
        formats = {"kv_format": kv_format, "ring_kv_format": ring_kv_format, "key_smoothing": key_smoothing}
        enable(model, plan, max_len=max_len, prefill_chunk=prefill_chunk, compile=compile, **formats)
        self.model = inner = served_model(model)
        try:
            chunk = None if prefill_chunk == "auto" else check_chunk(inner, prefill_chunk)
            _check_served(inner)
            session = session_of(inner)
            like = _after_a_forward(inner, session)
            budget = _budget(like, max_rows, memory)
            slots = Slots(ZigzagCache(inner.config, session.plan, max_len=max_len), max_rows, like)
            self._pool = Pool(budget, max_rows, max_len, slots.row_memory)
            self._scheduler, lock = Scheduler(self._pool, queue), threading.Condition()
            state, smoothed = functools.partial(model_state, inner), _smoothed(session.plan, chunk)
            prefixes = Prefixes(slots, self._pool, state, smoothed, prefix_cache)
            sizes = _sizes(max_rows) if compile else ()
            self._steps = Steps(session, prefixes, self._scheduler, Pace(max_stall_ms), lock, chunk, _eos_of(inner), sizes)
            self._steps.try_once()
            self._loop = Loop(self._steps)
        except BaseException:
            disable(model)
            raise
        self._close = weakref.finalize(self, _stop, self._loop, model, session)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close(drain=kind is None)

    def close(self, drain: bool = True) -> None:
        """Takes no more requests, waits until all have ended, and gives memory and model back. Once; then nothing.

        drain: False cancels what has not ended. One that was interrupted while it waited may be called again. Raises RuntimeError
        if called from `on_token`.
        """
        self._refuse_own_thread("close()")
        if (parts := self._close.peek()) is not None:
            _stop(*parts[2], drain)
            self._close.detach()

    def submit(
        self,
        prompt: str | Sequence[int] | Tensor,
        sampling: Sampling,
        on_token: Callable[[Token], None] | None = None,
        salt: str | None = None,
    ) -> Request:
        """Takes a request, and returns at once.

        Args:
            prompt: token ids, or a string for the tokenizer.
            on_token: called with each `Token` in the engine's thread, which waits for it. What it raises ends the request.
            salt: only requests of the same salt share beginnings of prompts.

        Raises:
            TypeError, ValueError: the prompt is empty, or not of the model's tokens; strings without a tokenizer.
            RequestTooLarge: it could never run; `fits` has the largest prompt + max_tokens that could.
            QueueFull: as many wait as may. EngineStopped: the engine is closed.
        """
        request = self._request(prompt, sampling, on_token, salt)
        self._loop.submit(request)
        return request

    def generate(
        self, prompts: Sequence, sampling: Sampling | Sequence[Sampling], progress: bool = False, salt: str | None = None
    ) -> list[Completion]:
        """Completions of all prompts, in their order. Waits for them, and for room in the queue.

        Args:
            prompts, salt: as in `submit`. sampling: of all, or one for each. progress: show a bar.

        Raises:
            What `submit` raises, QueueFull apart, before any prompt is read; what a request fails with, and the others are
            cancelled.
        """
        self._refuse_own_thread("generate()")
        if isinstance(prompts, str):
            raise TypeError("prompts must be a list of prompts, got a string")
        prompts = list(prompts)
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(samplings) != len(prompts):
            raise ValueError(f"sampling must be one Sampling, or one for each of {len(prompts)} prompts; got {len(samplings)}")
        requests = [self._request(*pair, salt=salt) for pair in zip(prompts, samplings, strict=True)]
        for request in requests:
            self._pool.check(request.job.prompt, request.job.max_tokens)
        try:
            for request in requests:
                self._loop.submit(request, waits=True)
            return [request.result() for request in tqdm(requests, disable=not progress, unit="prompt")]
        except BaseException:
            for request in requests:
                request.cancel()
            raise

    def capacity(self, prompt: int, max_tokens: int) -> int:
        """Requests with prompts of so many tokens and so many new ones that can run at once; 0: such a request never can."""
        _between("prompt", prompt, 1, 1 << 30)
        _between("max_tokens", max_tokens, 1, 1 << 30)
        return self._pool.capacity(prompt + max_tokens)

    @property
    def most_tokens(self) -> int:
        """The largest prompt + max_tokens of a request: `max_len`, or what the memory holds."""
        return self._pool.most

    @property
    def stopped(self) -> EngineStopped | None:
        """Why requests are not taken any more, as `submit` would raise it: an error has ended the engine, or it is closed."""
        return self._loop.stopped() if self._loop.is_closing or self._loop.error is not None else None

    def stats(self) -> dict[str, int]:
        """What the engine does and has done.

        queued, prefilling, decoding: requests now. finished, cancelled, failed: requests so far. kv_bytes: pages that requests
        take now. reserved_bytes: that admitted ones can come to take. cached_bytes: what is kept for prompts to come, and goes
        when it is needed. budget_bytes: for both. ring_bytes: what streaming layers take beside them. prompt_tokens, tokens: read
        and chosen so far. cached_tokens: of prompts, which were not read. steps: so far.
        """
        steps, slots = self._steps, self._steps.slots
        with steps.lock:
            numbers = {state: len(self._scheduler.in_state(state)) for state in (QUEUED, PREFILLING, DECODING)}
            numbers |= self._scheduler.ended | {"reserved_bytes": self._pool.reserved_bytes}
            pages = [slots.row_memory(int(slots.committed[job.row])) for job in self._scheduler.running]
        numbers |= {"kv_bytes": sum(pages), "cached_bytes": steps.prefixes.bytes, "budget_bytes": self._pool.budget}
        numbers |= {"ring_bytes": slots.ring_bytes, "prompt_tokens": steps.prompt_tokens, "tokens": steps.tokens}
        return numbers | {"cached_tokens": steps.cached_tokens, "steps": steps.steps}

    def _refuse_own_thread(self, call: str) -> None:
        if self._loop.is_current:
            raise RuntimeError(f"{call} waits for the engine, and was called by what the engine waits for: call it elsewhere")

    def _request(self, prompt, sampling: Sampling, on_token=None, salt: str | None = None) -> Request:
        if not isinstance(sampling, Sampling):
            raise TypeError(f"sampling must be a zz.Sampling, got a {type(sampling).__name__}")
        if not isinstance(salt, str | None):
            raise TypeError(f"salt must be a string or None, got {salt!r}")
        if self.tokenizer is None and (sampling.stop or isinstance(prompt, str)):
            what = "stop strings" if sampling.stop else "a prompt that is a string"
            raise ValueError(f"{what} need a tokenizer: give one to zz.Engine(tokenizer=)")
        ids = self._ids(prompt)
        seed = random.SystemRandom().getrandbits(64) if sampling.seed is None else sampling.seed
        stream = None if self.tokenizer is None else TextStream(self.tokenizer, sampling.stop)
        return Request(self._loop, ids, sampling, seed, stream, on_token, salt)

    def _ids(self, prompt) -> list[int]:
        if isinstance(prompt, str):
            prompt = self.tokenizer(prompt)["input_ids"]
        try:
            given = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError) as error:  # as torch sees it: None, texts, numbers beyond 64 bits
            raise TypeError(f"a prompt must be a string, or token ids in a list or tensor; got {shown(prompt)}") from error
        if given.dim() == 2 and len(given) == 1:
            given = given[0]
        if given.dim() != 1 or not len(given):
            raise ValueError(f"a prompt must be a list of at least one token, got shape {list(given.shape)}")
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"a prompt must be token ids, got {str(given.dtype)[6:]}")
        vocab = self.model.get_input_embeddings().weight.shape[0]
        if wrong := given[(given < 0) | (given >= vocab)].tolist():
            raise ValueError(f"a prompt must be of tokens 0 to {vocab - 1}, got {wrong[0]}")
        return given.tolist()


def _stop(loop: Loop, model: nn.Module, session, drain: bool = False) -> None:
    """Ends an engine. In the engine's own thread, where an engine that nobody holds was collected, another thread does it."""
    if loop.is_current:
        threading.Thread(target=_stop, args=(loop, model, session, drain)).start()
        return
    loop.stop(drain)
    with loop.lock:  # of two that close at once
        loop.steps.prefixes.forget()
        for layer in loop.steps.slots.cache.layers:
            layer.drop()
        if session_of(session.model) is session:
            disable(model)


def _check_served(model: nn.Module) -> None:
    """Raises ValueError by name for what `enable` serves and an engine does not."""
    family, session = model.config.model_type, session_of(model)
    devices = sorted({str(p.device) for p in model.parameters()})
    reason = None
    if is_composite(model):
        reason = "it is an image-text model"
    elif session.plan.state_layers:
        reason = f"layers {list(session.plan.state_layers)} keep states, which cannot be those of some rows only"
    elif "position_ids" not in session.parameters:
        reason = "its forward takes no position_ids"
    elif len(devices) > 1:
        reason = f"it is on several devices, {', '.join(devices)}"
    elif session.ranks is not None:
        reason = "it is shared out over processes (tensor parallelism), and requests come to one of them"
    elif found := rope_by_length(model):
        reason = f"the frequencies of {found} follow the longest row"
    if reason:
        raise ValueError(f"{family} is not served by zz.Engine: {reason}")


def _after_a_forward(model: nn.Module, session) -> ZigzagCache:
    """A cache of one token: it has what keys are like, of which configs do not tell all. Raises what the model raises."""
    cache, token = ZigzagCache(model.config, session.plan), torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad():
        session.run(cache.forward(1, 1), {"input_ids": token, "position_ids": token, "use_cache": True})
    return cache


def _budget(like: ZigzagCache, rows: int, memory: float | int) -> int:
    """Bytes for what rows take as tokens come: `memory`, see `Engine`, without the rings of all rows. Raises ValueError.

    like: as `Slots` takes it.
    """
    if isinstance(memory, bool) or not isinstance(memory, int | float):
        raise TypeError(f"memory must be a share of the free memory or a number of bytes, got {memory!r}")
    if not (0 < memory <= 1 if isinstance(memory, float) else memory > 0):
        raise ValueError(f"memory must be a share above 0 and up to 1.0, or a number of bytes above 0; got {memory!r}")
    device, rings = like.attention_layers[0].device, [store for store in like.stores if store.window]
    total = int(memory * free_bytes(device)) if isinstance(memory, float) else memory
    rings = sum(store.bytes_for(0, rows, *store.geometry[1:], store.dtype.itemsize) for store in rings)
    if rings >= total:
        raise ValueError(
            f"the rings of {rows} rows take {rings:,} bytes, memory={memory!r} allows {total:,}: give fewer max_rows"
        )
    return total - rings


def _sizes(rows: int) -> tuple[int, ...]:
    """Of the batches that steps of up to `rows` rows are compiled for."""
    return *(1 << i for i in range((rows - 1).bit_length())), rows


def _smoothed(plan: Plan, chunk: int | None) -> int:
    """Tokens of a prompt that the offset of smoothed keys is the mean of, at most; 0 without any."""
    return min(smoothing.TOKENS, chunk or smoothing.TOKENS) if plan.key_smoothing else 0


def _eos_of(model: nn.Module) -> frozenset[int]:
    """The tokens that generate() ends with."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return frozenset() if eos is None else frozenset([eos] if isinstance(eos, int) else map(int, eos))


def _between(name: str, value, least: int, most: int) -> None:
    if not least <= token_count(name, value) <= most:
        raise ValueError(f"{name} must be {least} to {most}, got {value}")
