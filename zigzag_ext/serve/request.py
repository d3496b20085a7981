"""Request: what a caller holds of one request, from any thread or event loop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .sampling import Draw, Sampling
from .scheduler import Job
from .text import TextStream


class Token(NamedTuple):
    """A new token: its id, and the text that it makes certain, "" without a tokenizer."""

    id: int
    text: str


@dataclass(frozen=True)
class Completion:
    """What became of a request.

    token_ids: the new tokens, with the one that ended it. text: of them, up to a stop string; None without a tokenizer.
    finish_reason: "stop" (a token that ends generate(), or a stop string), "length" (max_tokens) or "cancelled". prompt_tokens:
    tokens of the prompt. cached_tokens: how many of them were not read, since an earlier request had them. seed: of the samples.
    """

    token_ids: list[int]
    text: str | None
    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    seed: int


class Request:
    """A request that `Engine.submit` has taken.

    `async for token in request` gives all its `Token`s, from the first on, as they come. It ends with the request, and raises
    what the request failed with. Leaving the loop does not cancel.
    """

    def __init__(
        self,
        loop,
        prompt: list[int],
        sampling: Sampling,
        seed: int,
        stream: TextStream | None,
        on_token: Callable[[Token], None] | None,
        salt: str | None = None,
    ):
        self.prompt, self.sampling, self.seed, self.salt = prompt, sampling, seed, salt
        self.ids = np.array(prompt, dtype=np.int32)
        self.cached_tokens = 0  # of the prompt, which an earlier request had
        self.job = Job(len(prompt), sampling.max_tokens, self)
        self.finish_reason: str | None = None
        self.error: BaseException | None = None  # what ended it, if it failed
        self.is_cancelled = False  # whether it is to be
        self._loop, self._stream, self._on_token = loop, stream, on_token
        self._events: list[Token] = []
        self._listeners: list[Callable[[Token | None], None]] = []
        self._lock, self._ended = threading.Lock(), threading.Event()

    def __repr__(self) -> str:
        return f"<Request: {len(self.prompt)} + {len(self._events)} tokens, {self.state}>"

    @property
    def state(self) -> str:
        """ "queued", "prefilling", "decoding", "finished", "cancelled" or "failed"."""
        return self.job.state

    @property
    def tokens(self) -> list[int]:
        """The new tokens so far."""
        return [token.id for token in self._events.copy()]

    def cancel(self) -> None:
        """Ends the request within two steps of the engine; nothing if it has ended. Its tokens so far stay."""
        self.is_cancelled = True
        self._loop.wake()

    def result(self, timeout: float | None = None) -> Completion:
        """Waits until the request has ended, at most `timeout` seconds.

        Raises:
            TimeoutError: it has not ended by then, and goes on.
            RuntimeError: called from `on_token`, which the engine waits for.
            EngineStopped: the engine was closed before. Anything else: what the request failed with.
        """
        if not self._ended.is_set() and self._loop.is_current:
            raise RuntimeError("result() waits for the engine, and was called by what the engine waits for: call it elsewhere")
        if not self._ended.wait(timeout):
            raise TimeoutError(f"the request has not ended after {timeout} s, it is {self.state}")
        if self.error is not None:
            raise self.error
        text = None if self._stream is None else "".join(token.text for token in self._events)
        return Completion(self.tokens, text, self.finish_reason, len(self.prompt), self.cached_tokens, self.seed)

    async def __aiter__(self) -> AsyncIterator[Token]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def listen(event: Token | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, event)

        with self._lock:
            for event in [*self._events, *([None] if self._ended.is_set() else [])]:
                queue.put_nowait(event)
            self._listeners.append(listen)
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            with self._lock:
                self._listeners.remove(listen)
        if self.error is not None:
            raise self.error

    # What follows is the engine's to call, in its thread.

    @property
    def draw(self) -> Draw:
        """Of the next token."""
        return Draw(self.sampling, self.seed, len(self.prompt) + len(self._events))

    @property
    def latest(self) -> int:
        return self._events[-1].id

    def push(self, token: int, eos: frozenset[int]) -> str | None:
        """Takes the next token and hands it on. Returns why the request ends with it, or None. Raises what `on_token` raises."""
        reason, text = "stop" if token in eos and not self.sampling.ignore_eos else None, ""
        if len(self._events) + 1 == self.sampling.max_tokens:
            reason = reason or "length"
        if self._stream is not None:
            text = self._stream.push(token)
            text += self._stream.finish() if reason else ""
            reason = "stop" if self._stream.stopped else reason
        self._tell(Token(token, text))
        if self._on_token is not None:
            self._on_token(self._events[-1])
        return reason

    def end(self, reason: str, error: BaseException | None = None) -> None:
        self.finish_reason, self.error = reason, error
        self._ended.set()
        self._tell(None)

    def _tell(self, event: Token | None) -> None:
        with self._lock:
            if event is not None:
                self._events.append(event)
            for listen in self._listeners:
                listen(event)
