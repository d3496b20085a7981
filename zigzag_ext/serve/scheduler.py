"""Scheduler: which requests run, and whose prompt is read next. A state machine without torch, threads or clocks.

    queued -> prefilling -> decoding -> finished, and from each of these three -> cancelled or failed

Every step decodes all rows that decode, then reads a chunk of one prompt, or of several short ones. A request is admitted when
its row and all bytes that it can come to need are free, so none is ever preempted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import QueueFull
from .pool import Pool

QUEUED, PREFILLING, DECODING = "queued", "prefilling", "decoding"
FINISHED, CANCELLED, FAILED = ENDED = ("finished", "cancelled", "failed")
OVERTAKES = 16  # requests that may be admitted before an earlier one that needs more memory than is free
PATIENCE = 8  # steps that read prompts of others, before a prompt goes first whatever is left of it


@dataclass(eq=False)
class Job:
    """What the scheduler knows of a request: sizes in tokens. request: what it stands for, any object."""

    prompt: int
    max_tokens: int
    request: Any = None
    state: str = QUEUED
    row: int | None = None  # while it is prefilling or decoding
    room: int = 0  # tokens that its row is reserved for; more than `size` where it has taken over a longer one
    read: int = 0  # tokens of the prompt that its row holds
    overtaken: int = 0  # later jobs admitted before it
    waited: int = 0  # steps that read prompts of others since it was admitted, or had a chunk itself

    @property
    def size(self) -> int:
        return self.prompt + self.max_tokens

    @property
    def left(self) -> int:
        """Tokens of the prompt that are to be read."""
        return self.prompt - self.read


class Scheduler:
    """queue: most jobs that wait for admission."""

    def __init__(self, pool: Pool, queue: int, overtakes: int = OVERTAKES, patience: int = PATIENCE):
        self.pool, self.limit, self.overtakes, self.patience = pool, queue, overtakes, patience
        self.queue: list[Job] = []  # by arrival
        self.running: list[Job] = []  # by admission
        self.ended = dict.fromkeys(ENDED, 0)  # how many, by state

    @property
    def busy(self) -> bool:
        return bool(self.queue or self.running)

    @property
    def jobs(self) -> list[Job]:
        return [*self.queue, *self.running]

    def in_state(self, state: str) -> list[Job]:
        return [job for job in self.jobs if job.state == state]

    def submit(self, job: Job) -> None:
        """Raises RequestTooLarge for a job that never fits, QueueFull if as many wait as may."""
        self.pool.check(job.prompt, job.max_tokens)
        if len(self.queue) >= self.limit:
            raise QueueFull(f"{len(self.queue)} requests are waiting, which is as many as may (queue={self.limit})")
        self.queue.append(job)

    def admit(self, pick: Callable[[Job], tuple[int | None, int]] | None = None, most: int | None = None) -> list[Job]:
        """Gives rows to jobs that fit, in the order of arrival, `most` of them at most.

        Jobs that find no memory are overtaken by later ones that need less than each of them, `overtakes` times at most.

        pick: says which kept row a job takes, or None for an empty one, and the tokens that the row is then for. None: all take
        empty ones.
        """
        if not self.pool.free_rows:
            return []
        admitted, waiting, least, closed = [], [], self.pool.max_len + 1, False
        for job in self.queue:
            if len(admitted) != most and not closed and job.size < least and self.pool.fits(job.size):
                row, job.room = (None, job.size) if pick is None else pick(job)
                job.row, job.state = self.pool.take(job.room, row), PREFILLING
                admitted.append(job)
                for other in waiting:
                    other.overtaken += 1
            else:
                waiting.append(job)
                least = min(least, job.size)
            closed = closed or any(other.overtaken >= self.overtakes for other in waiting[:1])
        self.queue = waiting
        self.running += admitted
        return admitted

    def prompts(self) -> list[Job]:
        """The jobs whose prompts get chunks, in their turn: the least left first, but behind one that has waited too long."""
        prompts = sorted(self.in_state(PREFILLING), key=lambda job: job.left)
        longest = max(prompts, key=lambda job: job.waited, default=None)
        if longest is not None and longest.waited >= self.patience:
            prompts.remove(longest)
            prompts.insert(0, longest)
        return prompts

    def took_turns(self, read: list[Job]) -> None:
        """A step has read a chunk of each of these."""
        for job in self.in_state(PREFILLING):
            job.waited = 0 if job in read else job.waited + 1

    def advance(self, job: Job, tokens: int) -> None:
        """So many tokens more of its prompt are in its row."""
        if job.state != PREFILLING or not 0 < tokens <= job.left:
            raise RuntimeError(f"{tokens} tokens were read of a {job.state} request with {job.left} left")
        job.read += tokens
        if not job.left:
            job.state = DECODING

    def end(self, job: Job, state: str, keep: bool = False) -> None:
        """A job that has not ended ends so; its row and bytes are free. One that is not kept is empty before the next `admit`."""
        if state not in ENDED or job.state in ENDED:
            raise RuntimeError(f"a {job.state} request cannot become {state}")
        if job.state == QUEUED:
            self.queue.remove(job)
        else:
            self.running.remove(job)
            self.pool.give_back(job.row, keep)
        job.state, job.row = state, None
        self.ended[state] += 1

    def check(self) -> None:
        """Raises RuntimeError unless jobs, rows and reservations agree."""
        rows = {job.row: self.pool.row_memory(job.room) for job in self.running}
        known = [job.state == QUEUED for job in self.queue] + [job.state in (PREFILLING, DECODING) for job in self.running]
        if rows != self.pool.reserved or len(rows) != len(self.running) or not all(known):
            raise RuntimeError(f"the scheduler runs {rows}, the pool has reserved {self.pool.reserved}")
        if self.pool.reserved_bytes > self.pool.budget:
            raise RuntimeError(f"{self.pool.reserved_bytes} bytes are reserved, there are {self.pool.budget}")
