"""The config of an enabled model: one of its own, which says "zigzag" and whose copies say what the model had before.

A config may be shared by several models, and may be copied to make another model or to be saved; only the enabled one attends
through this package.
"""

import copy
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .attention import NAME

_plain: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by model: uses of `plain_name` under way, what they stand for
_plain_lock = threading.Lock()


class _Implementation(str):
    """NAME, in a config; in its copies and in files: the former implementation."""

    def __new__(cls, former: str | None):
        self = super().__new__(cls, NAME)
        self.former = former
        return self

    def __deepcopy__(self, memo: dict) -> str | None:
        return self.former

    def __reduce_ex__(self, protocol: int):
        return copy.copy, (self.former,)


def use_zigzag(given: nn.Module, model: nn.Module) -> None:
    """Gives `model`, and `given`, which is the model or wraps it, a config of their own that says NAME.

    Raises RuntimeError, and changes nothing, if the model does not take its attention from transformers' AttentionInterface.
    """
    shared, own = model.config, copy.deepcopy(model.config)
    former = own._attn_implementation
    _exchange(given, shared, own)
    try:
        model.set_attn_implementation(NAME)
        if own._attn_implementation != NAME:
            raise RuntimeError(f"{own.model_type} does not take its attention from transformers' AttentionInterface")
    except BaseException:
        _exchange(given, own, shared)
        raise
    own._attn_implementation = _Implementation(former)


def use_former(model: nn.Module) -> None:
    """Undoes `use_zigzag`; the config stays the model's own."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation(getattr(implementation, "former", implementation))


@contextmanager
def plain_name(model: nn.Module) -> Iterator[None]:
    """For the compiler, which takes a str for a constant and none of its subclasses. Threads may overlap."""
    with _plain_lock:
        users, implementation = _plain.get(model, (0, model.config._attn_implementation))
        _plain[model] = users + 1, implementation
        model.config._attn_implementation = NAME
    try:
        yield
    finally:
        with _plain_lock:
            users, implementation = _plain.pop(model)
            if users > 1:
                _plain[model] = users - 1, implementation
            else:
                model.config._attn_implementation = implementation


def _exchange(given: nn.Module, old, new) -> None:
    for module in given.modules():
        for name in [name for name, value in vars(module).items() if value is old]:
            setattr(module, name, new)
