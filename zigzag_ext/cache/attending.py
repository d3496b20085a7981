"""What attends in a thread: a forward of a cache, or what stands in for one."""

import threading

_current = threading.local()  # .entry: what attends in this thread, None or absent outside a forward


def current():
    """What attends in this thread, or None: an object with `was_given(layer)`, `attend(layer, q, k, v, scale, terms)` and
    `native_window(layer)`, the window that the model itself must ask for, 0: none."""
    return getattr(_current, "entry", None)


class attending:
    """`with attending(entry):` makes `entry` the `current()` one. May be nested: a model may call another one.

    The outermost ones come in pairs, `with attending(None), attending(entry):`. An interrupt may keep the inner one from putting
    back what was there before; the outer one does then.
    """

    def __init__(self, entry):
        self.entry = entry

    def __enter__(self) -> None:
        self.before = current()
        _current.entry = self.entry

    def __exit__(self, *error) -> None:
        _current.entry = self.before
