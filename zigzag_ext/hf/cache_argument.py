"""Which argument of a model is its KV cache, and which versions of transformers that was tested with.

transformers calls it `past_key_values`, from 5.24 on `cache`, in forwards, in generate() and in outputs. Here it is told by what
it is: a `Cache` among the arguments of a call, a parameter annotated as one where there is none yet.
"""

import functools
import inspect
import warnings

import transformers
from packaging.version import Version
from torch import nn
from transformers.cache_utils import Cache

TESTED = ("5.4", "5.24")  # oldest and newest transformers that the tests run with
_NAMES = ("cache", "past_key_values")  # only for what a type cannot tell: None, tuples of old, parameters without an annotation


def tested_range() -> str:
    """The installed version and the tested ones, for messages."""
    return f"transformers {transformers.__version__} is installed; zigzag_ext was tested with {TESTED[0]} to {TESTED[1]}"


@functools.lru_cache(maxsize=1)
def warn_if_untested() -> None:
    """Warns the caller of the caller, once per process, if the installed transformers is newer than the tested ones."""
    if Version(transformers.__version__).release[:2] > Version(TESTED[1]).release:
        warnings.warn(f"{tested_range()}: what the newer one has changed may not be served", stacklevel=3)


def forward_parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of the model's forward."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if [p.kind for p in parameters] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]  # a wrapper that hands all of it on
    return parameters


def cache_parameter(model: nn.Module) -> str:
    """Name of the parameter of the model's forward that takes the KV cache. Raises RuntimeError if there is none."""
    parameters = forward_parameters(model)
    typed = [p.name for p in parameters if "Cache" in str(p.annotation)]
    if found := typed or [p.name for p in parameters if p.name in _NAMES]:
        return found[0]
    raise RuntimeError(
        f"{type(model).__name__}.forward() has no parameter for a KV cache, typed as a Cache or named {' or '.join(_NAMES)} "
        f"({tested_range()})"
    )


def cache_argument(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """`model.generate(ids, **cache_argument(model, cache))`: the cache by the name that this transformers has for it."""
    return {cache_parameter(model): cache}


def split_cache(kwargs: dict) -> tuple[object, dict]:
    """The cache among a forward's arguments, whatever its name, or None; and the other arguments.

    Raises:
        ValueError: several arguments hold different caches.
    """
    named = {name: value for name, value in kwargs.items() if isinstance(value, Cache) or name in _NAMES}
    given = {name: value for name, value in named.items() if value is not None}
    cache = next(iter(given.values()), None)
    if any(other is not cache for other in given.values()):
        raise ValueError(f"a forward takes one cache, {' and '.join(given)} are different ones")
    return cache, {name: value for name, value in kwargs.items() if name not in named}
