"""Ctrl-C, or no memory, at a chosen place of a call."""

import sys
from collections.abc import Callable

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from zigzag_ext.attention.buffers import GrowingBuffer


class Places:
    """Counts what a call runs, and raises at the `at`-th place (0: nowhere).

    A place is a line of any Python file but the tests; with `own` of the package's files alone; with `opcodes` an instruction of
    these: an interrupt comes between two instructions, so that `a, b = 1, 2` may end with `a` alone.
    """

    def __init__(self, at: int = 0, opcodes: bool = False, own: bool = False):
        self.at, self.opcodes, self.own, self.count = at, opcodes, own, 0

    def run(self, call: Callable[[], object]) -> bool:
        """Whether the call was interrupted."""
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            call()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    def _enter(self, frame, event, arg):
        if "/tests/" in frame.f_code.co_filename:
            return None
        ours = "/zigzag_ext/" in frame.f_code.co_filename
        frame.f_trace_opcodes = self.opcodes and ours
        return self._place if ours or not self.own else None

    def _place(self, frame, event, arg):
        if event == ("opcode" if frame.f_trace_opcodes else "line"):
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._place


class OutOfMemory(TorchDispatchMode):
    """Counts what a call asks memory for, torch's ops and growing buffers, and refuses it the `at`-th time (0: never)."""

    def __init__(self, at: int = 0):
        super().__init__()
        self.at, self.count = at, 0

    def run(self, call: Callable[[], object]) -> bool:
        """Whether memory was refused."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("_use", "_commit"):
                patch.setattr(GrowingBuffer, name, self._refusing(getattr(GrowingBuffer, name)))
            try:
                with self:
                    call()
            except MemoryError:
                return True
        return False

    def _refusing(self, function):
        def run(*args):
            self._ask()
            return function(*args)

        return run

    def _ask(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise MemoryError("refused by a test")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self._ask()
        return func(*args, **(kwargs or {}))
