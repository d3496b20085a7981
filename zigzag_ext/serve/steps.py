"""Steps: what an engine does in its thread, one step after the other. No threads are made here."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..cache.tokens import to_device
from ..hf.session import Session
from .pace import Pace
from .prefixes import MARK_EVERY, Prefixes
from .sampling import choose
from .scheduler import CANCELLED, DECODING, FAILED, FINISHED, Job, Scheduler


class Steps:
    """Runs the jobs of a scheduler on the rows of `prefixes`' slots.

    lock: a condition, of the scheduler, which other threads submit to. chunk: tokens of a prompt that are read at once; None: as
    many as `pace` says. eos: tokens that end a request. sizes: of the batches that decode steps are compiled for, ascending, the
    last one for all rows; none: they run as they are.
    """

    def __init__(
        self,
        session: Session,
        prefixes: Prefixes,
        scheduler: Scheduler,
        pace: Pace,
        lock,
        chunk: int | None,
        eos: frozenset[int],
        sizes: Sequence[int] = (),
    ):
        self.session, self.prefixes, self.scheduler, self.pace, self.lock = session, prefixes, scheduler, pace, lock
        self.slots = prefixes.slots
        self.chunk, self.eos, self.sizes, self.device = chunk, eos, sizes, self.slots.cache.attention_layers[0].device
        self.constant = {"use_cache": True, "return_dict": True}
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in session.parameters else {}
        self.has_body = session.model.base_model is not session.model
        self.steps = self.prompt_tokens = self.cached_tokens = self.tokens = 0  # done so far

    def step(self) -> None:
        """One token for every row that decodes, then a chunk of one prompt, or of several that are short together.

        What fails in either ends the requests that took part in it. Raises only where their rows cannot be emptied.
        """
        with self.lock:
            cancelled = [job for job in self.scheduler.jobs if job.request.is_cancelled]
        for job in cancelled:
            self._end(job, CANCELLED, "cancelled")
        while self._admit():
            pass
        with self.lock:
            decoding = self.scheduler.in_state(DECODING)
        if decoding:
            self._decode(decoding)
        self._read_prompts()
        self.steps += 1

    def try_once(self) -> None:
        """Tokens in row 0, one by one, in steps of every size. Raises what a model raises that cannot be served, or compiled."""
        with torch.no_grad():
            for size in self.sizes or (None,):
                self.slots.take(0, 1)
                self._forward([0], [[0]], batch=size)
                self.slots.release(0)

    def check(self) -> None:
        """Raises RuntimeError unless jobs, rows, reservations and memory agree."""
        with self.lock:
            self.scheduler.check()
            rooms = {job.row: job.room for job in self.scheduler.running}
        kept = self.prefixes.pool.kept
        if rooms != {row: limit for row, limit in enumerate(self.slots.limits.tolist()) if limit and row not in kept}:
            raise RuntimeError(f"the scheduler runs rows of {rooms} tokens, the slots have {self.slots.limits.tolist()}")
        self.prefixes.check()
        self.slots.check()

    def _admit(self) -> bool:
        """Gives a row to the next job that can have one, with what others have read of its prompt already."""
        with self.lock:
            admitted = self.scheduler.admit(self.prefixes.pick, most=1)
        for job in admitted:
            self._spare(job, self.prefixes.begin(job))
            self._resume(job)
        return bool(admitted)

    def _resume(self, job: Job) -> None:
        try:
            self._spare(job, self.prefixes.resume(job))
        except Exception as error:
            self._fail(job, error)

    def _spare(self, job: Job, tokens: int) -> None:
        """So many tokens more of its prompt are in its row, and were not read for it."""
        if tokens:
            job.request.cached_tokens += tokens
            self.cached_tokens += tokens
            with self.lock:
                self.scheduler.advance(job, tokens)

    def _decode(self, jobs: list[Job]) -> None:
        jobs = [job for job in jobs if self._has_memory(job)]
        if not jobs:
            return
        try:
            size = next((size for size in self.sizes if size >= len(jobs)), None)
            logits = self._forward([job.row for job in jobs], [[job.request.latest] for job in jobs], batch=size)
            tokens = choose(logits, [job.request.draw for job in jobs])
        except Exception as error:
            for job in jobs:
                self._fail(job, error)
            return
        for job, token in zip(jobs, tokens, strict=True):
            if self.slots.held[job.row] % MARK_EVERY == 0:
                self.prefixes.mark(job)
            self._emit(job, token)

    def _has_memory(self, job: Job) -> bool:
        """Gets memory for one more token of its row; a job that finds none fails alone."""
        try:
            self.slots.grow(job.row, 1)
        except Exception as error:
            self._fail(job, error)
            return False
        return True

    def _read_prompts(self) -> None:
        """A chunk of the prompt whose turn it is, and one of each behind it while they are to take no longer than one may."""
        with self.lock:
            prompts = self.scheduler.prompts()
        read, until = [], time.perf_counter() + self.pace.limit_ms / 1e3
        for job in prompts:
            self._resume(job)
            if job.row is None:
                continue
            stop = self.prefixes.next_mark(job)
            count = min(self.chunk or self.pace.chunk(job.left, job.read), job.left, stop - job.read)
            if read and time.perf_counter() + self.pace.predict(count, job.read) / 1e3 > until:
                break
            read.append(job)
            self._read(job, count, stop)
        with self.lock:
            self.scheduler.took_turns(read)

    def _read(self, job: Job, count: int, stop: int) -> None:
        """The next `count` tokens of a prompt. stop: where the next mark is to be made."""
        before, started = job.read, time.perf_counter()
        ids, is_last = job.request.prompt[before : before + count], count == job.left
        token = None
        try:
            logits = self._forward([job.row], [ids], head=is_last)
            if is_last:
                [token] = choose(logits, [job.request.draw])
            elif self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except Exception as error:
            return self._fail(job, error)
        self.pace.note(count, before, (time.perf_counter() - started) * 1e3)
        self.prompt_tokens += count
        with self.lock:
            self.scheduler.advance(job, count)
        if is_last or job.read == stop:
            self.prefixes.mark(job)
        if is_last:
            self._emit(job, token)

    def _forward(
        self, rows: list[int], ids: Sequence[Sequence[int]], head: bool = True, batch: int | None = None
    ) -> Tensor | None:
        """Runs ids [rows, n] behind what the rows hold. Returns logits [rows, vocab] of the last ones; without `head` nothing.

        batch: as in `Slots.forward`.
        """
        tokens = np.asarray(ids, dtype=np.int64)
        positions = self.slots.held[rows][:, None] + np.arange(tokens.shape[1])
        if batch is not None:
            tokens, positions = (np.pad(t, ((0, batch - len(rows)), (0, 0))) for t in (tokens, positions))
        inputs = {"input_ids": to_device(tokens, self.device), "position_ids": to_device(positions, self.device)}
        head = head or not self.has_body
        inputs |= self.constant | (self.last_only if head else {})
        output = self.session.run(self.slots.forward(rows, tokens.shape[1], batch), inputs, head)
        return output.logits[: len(rows), -1] if head else None

    def _emit(self, job: Job, token: int | None) -> None:
        if token is None:
            return self._fail(job, RuntimeError("the model gave logits that are not finite"))
        self.tokens += 1
        try:
            reason = job.request.push(token, self.eos)
        except Exception as error:  # of the tokenizer or of on_token
            return self._fail(job, error)
        if reason is not None:
            self._end(job, FINISHED, reason)

    def _fail(self, job: Job, error: Exception) -> None:
        self._end(job, FAILED, "failed", error)

    def _end(self, job: Job, state: str, reason: str, error: Exception | None = None) -> None:
        keep = False
        if job.row is not None:
            keep = state != FAILED and self.prefixes.keep(job)
            if not keep:
                self.prefixes.drop(job.row)
                self.slots.release(job.row)
        with self.lock:
            self.scheduler.end(job, state, keep)
        job.request.end(reason, error)
