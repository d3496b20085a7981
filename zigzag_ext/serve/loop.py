"""Loop: the thread of an engine, and how others talk to it."""

import threading

import torch

from .errors import EngineStopped, QueueFull
from .request import Request
from .scheduler import FAILED
from .steps import Steps


class Loop:
    """Runs `Steps` in a thread of its own, from the first request until `stop`."""

    def __init__(self, steps: Steps):
        self.lock, self.steps = steps.lock, steps
        self.is_closing = False
        self.error: BaseException | None = None  # what has ended the thread
        self.thread: threading.Thread | None = None

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self.thread

    def wake(self) -> None:
        with self.lock:
            self.lock.notify_all()

    def submit(self, request: Request, waits: bool = False) -> None:
        """waits: until there is room in the queue, instead of QueueFull. Raises what the scheduler raises, and EngineStopped."""
        with self.lock:
            if self.thread is None and not self.is_closing:
                thread = threading.Thread(target=self._run, name="zigzag engine", daemon=True)
                thread.start()
                self.thread = thread
            while True:
                if self.is_closing or self.error is not None:
                    raise self.stopped() from self.error
                try:
                    self.steps.scheduler.submit(request.job)
                    break
                except QueueFull:
                    if not waits:
                        raise
                self.lock.wait()
            self.lock.notify_all()

    def stopped(self) -> EngineStopped:
        why = "is closed" if self.error is None else f"was ended by {type(self.error).__name__}: {self.error}"
        return EngineStopped(f"the engine {why}; make another one")

    def stop(self, drain: bool = False) -> None:
        """Ends the thread when all requests have ended; without `drain` they are cancelled. Waits for it, but not in it."""
        with self.lock:
            self.is_closing = True
            for job in [] if drain else self.steps.scheduler.jobs:
                job.request.is_cancelled = True
            self.lock.notify_all()
        if self.thread is not None and not self.is_current:
            self.thread.join()

    def _run(self) -> None:
        scheduler = self.steps.scheduler
        try:
            with torch.no_grad():
                while self._waits_for_work():
                    self.steps.step()
                    with self.lock:
                        self.lock.notify_all()  # there may be room in the queue
                    if not scheduler.busy:
                        self.steps.check()
        except BaseException as error:
            with self.lock:
                self.error, jobs = error, scheduler.jobs
                for job in jobs:
                    scheduler.end(job, FAILED)
                self.lock.notify_all()
            for job in jobs:
                stopped = self.stopped()
                stopped.__cause__ = error
                job.request.end("failed", stopped)

    def _waits_for_work(self) -> bool:
        """False when there is none and will be none."""
        with self.lock:
            while not self.steps.scheduler.busy:
                if self.is_closing:
                    return False
                self.lock.wait()
        return True
