"""What takes long says so while it lasts, to whoever asked: the command line shows it, other programs hear nothing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

_show: Callable[[str], AbstractContextManager] | None = None


def show_by(show: Callable[[str], AbstractContextManager] | None) -> None:
    """Enters `show(text)` around everything that takes long from now on; None: nothing."""
    global _show
    _show = show


def waiting(text: str) -> AbstractContextManager:
    """Around what takes long. text: what is done, and how long that takes if it is known."""
    return nullcontext() if _show is None else _show(text)
