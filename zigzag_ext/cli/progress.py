"""A line on stderr while something takes long: what it is, how far it is, how long it has taken and will take.

Only on a terminal, and not with `zigzag --quiet`. Lines go when what they tell of ends; standard output never has any.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..planning.waiting import show_by

screen = Console(stderr=True, markup=False, emoji=False, highlight=False)
_wanted = True
_lines: list["Line"] = []  # what is under way, outermost first
_is_mid_line = False  # standard output does not stand at the start of a line


class Line:
    """What is under way. `update` may be called as often as there is something to say."""

    def __init__(self, text: str):
        self.say(text)

    def update(self, done: int, total: int) -> None:
        """done of total; the first call says where a run that was interrupted goes on."""
        self.first = done if self.first is None else self.first
        self.done, self.total = done, total

    def say(self, text: str) -> None:
        """Another step begins, which is timed for itself."""
        self.text, self.start = text, time.monotonic()
        self.first = self.done = self.total = None

    def step(self, text: str, done: int, total: int) -> None:
        """done of total of the step of that text, which begins if another one was under way."""
        if text != self.text:
            self.say(text)
        self.update(done, total)

    def at(self, now: float) -> str:
        """The line at a time, in seconds of `time.monotonic`."""
        elapsed, parts = now - self.start, []
        if self.total:
            parts.append(f"{self.done} of {self.total}")
        parts.append(_clock(elapsed))
        if self.total and self.done > self.first:
            parts.append(f"about {_clock(elapsed / (self.done - self.first) * (self.total - self.done))} left")
        return f"{self.text}: {', '.join(parts)}"


def want(wanted: bool) -> None:
    """Whether lines are shown from now on, where stderr is a terminal; also those of the rest of the package."""
    global _wanted
    _wanted = wanted
    show_by(waiting)


@contextmanager
def waiting(text: str) -> Iterator[Line]:
    """Shows a line while its block runs, below those of blocks around it."""
    line = Line(text)
    if not (_wanted and screen.is_terminal and not screen.is_dumb_terminal):
        yield line
        return
    live = None
    if not _lines:
        if _is_mid_line and sys.stdout.isatty():
            screen.print()  # the line is drawn over what stands in its place
        live = Live(get_renderable=_drawn, console=screen, transient=True, redirect_stdout=False, redirect_stderr=False)
    _lines.append(line)
    try:
        if live is not None:
            live.start(refresh=True)
        yield line
    finally:
        if live is not None:
            live.stop()
        _lines.remove(line)


def _drawn() -> Text:
    now = time.monotonic()
    return Text("\n".join(line.at(now) for line in _lines), no_wrap=True, overflow="ellipsis")


def show(text: str) -> None:
    """Prints a piece of text to standard output at once."""
    global _is_mid_line
    print(text, end="", flush=True)
    _is_mid_line = not text.endswith("\n") if text else _is_mid_line


def load(model: str, device: str, dtype: str, device_map: str | None = None, tp: bool = False, weights: str | None = None):
    """As `load_model`, with a line while it lasts."""
    from ..study.loading import load_model

    with waiting(f"loading {model}"):
        return load_model(model, device, dtype, device_map, tp, weights)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
