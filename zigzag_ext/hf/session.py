"""One enabled model: what stands before its `forward` and its `generate`."""

import copy
import functools
import inspect
import types
import warnings

import torch
from torch import nn

from ..cache import ZigzagCache
from ..cache.forward import attending
from .cache_argument import cache_parameter, split_cache
from .chunking import TOKEN_ARGUMENTS, new_tokens, pieces_of
from .compiled import CompiledDecoding

_ATTRIBUTE = "_zigzag_session"


def session_of(model: nn.Module) -> "Session | None":
    """The session of an enabled model."""
    return vars(model).get(_ATTRIBUTE)


class Session:
    """Gives every forward of a model its cache and brackets it; undone by `remove`. A copy of the model has a copy of it."""

    def __init__(
        self, model: nn.Module, plan, cache_options: dict, prefill_chunk: int | str | None, compile: bool, previous: str
    ):
        self.model, self.plan, self.cache_options, self.previous = model, plan, cache_options, previous
        self.prefill_chunk, self.compile = prefill_chunk, compile
        self.replaced = {name: vars(model)[name] for name in ("forward", "generate") if name in vars(model)}
        self.cache_name = cache_parameter(model)
        parameters = inspect.signature(model.forward).parameters.values()
        self.parameters = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        self.start()
        setattr(model, _ATTRIBUTE, self)
        for name in ("forward", "generate"):
            setattr(model, name, _InFront(self, name))

    def start(self) -> None:
        """What belongs to this model alone."""
        self.compiled = CompiledDecoding(self.model, self.behind("forward")) if self.compile else None
        self.warned = False

    def behind(self, name: str):
        """The model's own method `name`."""
        return self.replaced.get(name) or types.MethodType(getattr(type(self.model), name), self.model)

    def remove(self) -> None:
        """Gives the model its former methods back."""
        for name in ("forward", "generate"):
            delattr(self.model, name)
        for name, method in self.replaced.items():
            setattr(self.model, name, method)
        delattr(self.model, _ATTRIBUTE)

    def __deepcopy__(self, memo: dict) -> "Session":
        other = memo[id(self)] = object.__new__(Session)
        own = {name: value for name, value in vars(self).items() if name not in ("model", "replaced", "compiled", "warned")}
        vars(other).update(own)
        other.model = copy.deepcopy(self.model, memo)
        other.replaced = copy.deepcopy(self.replaced, memo)
        other.start()
        return other

    def forward(self, *args, **kwargs):
        kwargs = self._by_name(args, kwargs)
        if kwargs.get("output_attentions"):
            raise ValueError("zigzag attention has no attention weights to return: output_attentions must be off")
        if all(kwargs.get(name) is None for name in TOKEN_ARGUMENTS):
            raise ValueError(
                f"{type(self.model).__name__} was called without input_ids and without inputs_embeds; pass one of them"
            )
        cache, kwargs = self._with_cache(kwargs)
        noted = (kwargs.get(name) for name in ("attention_mask", "input_ids", "position_ids"))
        forward = cache.forward(*new_tokens(kwargs), *noted)
        with self._without_gradients(), forward, attending(forward):
            if self.compiled is not None and forward.decodes:
                return self.compiled(forward, kwargs)
            *ahead, last = pieces_of(self.model, forward, kwargs, self.prefill_chunk)
            for piece in ahead:
                with forward.piece(new_tokens(piece)[1]):
                    self.model.base_model(**piece)
            with forward.piece(new_tokens(last)[1]):
                return self.behind("forward")(**last)

    def generate(self, *args, **kwargs):
        names = [name for name in inspect.signature(self.behind("generate")).parameters if name != "kwargs"]
        given = dict(zip(names, args, strict=False)) | kwargs
        config = given.get("generation_config") or self.model.generation_config
        wanted = lambda name: given.get(name) if given.get(name) is not None else getattr(config, name, None)  # noqa: E731
        for name in ("assistant_early_exit", "cache_implementation"):
            if wanted(name) is not None:
                raise ValueError(f"zigzag attention does not serve {name}={wanted(name)!r}: leave it None")
        cache, kwargs = split_cache(kwargs)
        ids = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
        if cache is None and wanted("use_cache") is not False:
            cache = self.new_cache()
        elif isinstance(cache, ZigzagCache) and ids is not None and not wanted("prefill_chunk_size"):
            cache.keep_first(ids, given.get("attention_mask"))
        if isinstance(cache, ZigzagCache):
            cache.state.prompt_end = ids.shape[1] if ids is not None and wanted("prefill_chunk_size") else 0
        kwargs |= {} if cache is None else {self.cache_name: cache}
        return self.behind("generate")(*args, **kwargs)

    def new_cache(self) -> ZigzagCache:
        if self.compiled is not None:
            return self.compiled.new_cache(self.plan, self.cache_options)
        return ZigzagCache(self.model.config, self.plan, **self.cache_options)

    def _by_name(self, args: tuple, kwargs: dict) -> dict:
        """All arguments by name; TypeError as Python would raise it for the call."""
        if not args:
            return kwargs
        name = f"{type(self.model).__name__}.forward()"
        if len(args) > len(self.parameters):
            raise TypeError(f"{name} takes {len(self.parameters)} positional arguments but {len(args)} were given")
        positional = dict(zip(self.parameters, args, strict=False))
        if twice := sorted(positional.keys() & kwargs.keys()):
            raise TypeError(f"{name} got multiple values for argument '{twice[0]}'")
        return kwargs | positional

    def _with_cache(self, kwargs: dict) -> tuple[ZigzagCache, dict]:
        """The cache of this forward, and its arguments with that cache among them unless the caller wants none."""
        config, (given, kwargs) = self.model.config, split_cache(kwargs)
        if given is None:
            use_cache = config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
            if not use_cache:
                return ZigzagCache.without_memory(config, self.plan), kwargs
            given = self.new_cache()
        if not isinstance(given, ZigzagCache):
            raise TypeError(
                f"a model with zigzag attention takes a ZigzagCache or no cache, got a {type(given).__name__}: pass "
                f"{self.cache_name}=zz.ZigzagCache(model.config, plan), or the one that the first forward returns"
            )
        if len(given.layers) != config.num_hidden_layers:
            raise ValueError(f"the ZigzagCache has {len(given.layers)} layers, the model has {config.num_hidden_layers}")
        return given, kwargs | {self.cache_name: given}

    def _without_gradients(self):
        """no_grad, and one warning where gradients would have been recorded."""
        if not self.warned and torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            self.warned = True
            warnings.warn("zigzag attention is for inference: no gradients are recorded, as under torch.no_grad()", stacklevel=4)
        return torch.no_grad()


class _InFront:
    """Stands in the place of a model's method; looks like it to `inspect.signature`, which generate() reads."""

    def __init__(self, session: Session, name: str):
        self.session, self.name = session, name
        functools.update_wrapper(self, session.behind(name))

    def __call__(self, *args, **kwargs):
        return getattr(self.session, self.name)(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> "_InFront":
        return _InFront(copy.deepcopy(self.session, memo), self.name)
