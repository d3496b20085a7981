"""One enabled model: what stands before its `forward` and its `generate`."""

import copy
import functools
import inspect
import types
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from transformers import StoppingCriteriaList

from ..cache import ZigzagCache
from ..cache.attending import attending
from ..cache.fingerprints import fingerprints
from ..cache.forward import Forward
from ..planning.layers import text_config
from .cache_argument import cache_parameter, forward_parameters, split_cache
from .chunking import TOKEN_ARGUMENTS, new_tokens, pieces_of
from .compiled import CompiledDecoding
from .images import brings_images, deltas_of, give_deltas
from .own_config import use_zigzag
from .ranks import Ranks

_ATTRIBUTE = "_zigzag_session"
_ENGINE = "zz.Engine serves requests that come and go; or use generate() with a left-padded batch, or disable() before"
_INSTEAD = {  # what an enabled model does not serve: what to do
    "generate_batch": _ENGINE,
    "init_continuous_batching": _ENGINE,
    "continuous_batching_context_manager": _ENGINE,
    "set_attn_implementation": "call zigzag_ext.disable(model) before",
    "_replicate_for_data_parallel": "torch.nn.DataParallel copies no cache; use device_map='auto' or tp_plan='auto'",
}
_FOR_GENERATE = ("tokenizer", "assistant_tokenizer")  # arguments of generate() that it hands down to every forward
_OPTIONS = {  # of generate(), likewise
    "assistant_early_exit": "leave it None",
    "cache_implementation": "leave it None, the plan decides what is kept; enable(max_len=...) and Plan(kv_format=...) say how",
    "output_attentions": "no weights are computed; call zigzag_ext.disable(model) and model.set_attn_implementation('eager') "
    "to look at them, or `zigzag identify` to score heads",
}


def _as_of_an_assistant(kwargs: dict) -> dict:
    """transformers 5.4 asks its assistants for a cache that can be cropped by this name; whether ours can, `rollback` says."""
    config = kwargs.get("generation_config")
    if getattr(config, "cache_implementation", None) != "dynamic_full":
        return kwargs
    config = copy.copy(config)
    config.cache_implementation = None
    return kwargs | {"generation_config": config}


def session_of(model: nn.Module) -> "Session | None":
    """The session of an enabled model."""
    return vars(model).get(_ATTRIBUTE)


class Session:
    """Gives every forward of a model its cache and brackets it; undone by `remove`. A copy of the model has a copy of it."""

    def __init__(self, model: nn.Module, plan, cache_options: dict, prefill_chunk: int | str | None, compile: bool):
        self.model, self.plan, self.cache_options = model, plan, cache_options
        self.prefill_chunk, self.compile = prefill_chunk, compile
        self.ranks = Ranks.of(model)
        self.cache_name = cache_parameter(model)
        self.parameters = tuple(p.name for p in forward_parameters(model) if p.kind is p.POSITIONAL_OR_KEYWORD)
        served = ("forward", "generate")
        self.replaced = {name: vars(model)[name] for name in (*served, *_INSTEAD) if name in vars(model)}
        self.attributes = {name: _InFront(self, name) for name in served if hasattr(model, name)}
        self.attributes |= {name: _refusal(model, name) for name in _INSTEAD if hasattr(model, name)}
        self.attributes |= {_ATTRIBUTE: self, "__reduce_ex__": self.reduce, "__deepcopy__": self.copy_model}
        self.compiled = CompiledDecoding(model, self.behind("forward")) if compile else None
        self.warned = self.is_removed = False
        vars(model).update(self.attributes)

    def behind(self, name: str):
        """The model's own method `name`."""
        return self.replaced.get(name) or types.MethodType(getattr(type(self.model), name), self.model)

    def remove(self) -> None:
        """Gives the model its former methods back. One that was wrapped since then stays, and what it wraps hands on.

        May be called again after an interrupt: the model has this session until `close`.
        """
        self.is_removed, self.compiled = True, None
        attributes = vars(self.model)
        for name in self.attributes.keys() - {_ATTRIBUTE}:
            if attributes.get(name) is not self.attributes[name]:
                continue
            if name in self.replaced:
                attributes[name] = self.replaced[name]
            else:
                del attributes[name]

    def close(self) -> None:
        """Behind `remove`."""
        vars(self.model).pop(_ATTRIBUTE, None)

    def _without(self, state: dict) -> dict:
        """A model's attributes as they are without those that the session put there."""
        own = {name for name, value in self.attributes.items() if state.get(name) is value}
        return {name: value for name, value in state.items() if name not in own} | {
            name: value for name, value in self.replaced.items() if name in own
        }

    def reduce(self, protocol: int):
        """`model.__reduce_ex__`, for pickle and torch.save: what is saved is the model without this package."""
        function, arguments, state, *rest = type(self.model).__reduce_ex__(self.model, protocol)
        return function, arguments, self._without(state), *rest

    def copy_model(self, memo: dict) -> nn.Module:
        """`model.__deepcopy__`: a copy of the model, enabled like it."""
        function, arguments, state, *_ = self.reduce(4)
        other = memo[id(self.model)] = function(*arguments)
        other.__setstate__(copy.deepcopy(state, memo))
        use_zigzag(other, other, {})
        Session(other, self.plan, self.cache_options, self.prefill_chunk, self.compile)
        return other

    def forward(self, *args, **kwargs):
        kwargs = {name: value for name, value in self._by_name(args, kwargs).items() if name not in _FOR_GENERATE}
        self._check_arguments(kwargs)
        cache, kwargs = self._with_cache(kwargs)
        kwargs = self._with_positions(cache, kwargs)
        noted = kwargs.get("attention_mask"), self._known(kwargs), kwargs.get("position_ids")
        forward = cache.forward(*new_tokens(kwargs), *noted, images=brings_images(kwargs))
        deltas = deltas_of(self.model, cache, kwargs)
        with self._without_gradients(), self._together(), deltas, forward, attending(None), attending(forward):
            if self.compiled is not None and forward.decodes:
                return self.compiled(forward, kwargs)
            *ahead, last = pieces_of(self.model, forward, kwargs, self.prefill_chunk)
            for piece in ahead:
                with forward.piece(new_tokens(piece)[1]):
                    self.model.base_model(**piece)
            with forward.piece(new_tokens(last)[1]):
                return self.behind("forward")(**last)

    def step(self, cache: ZigzagCache, counts, **inputs):
        """A forward of up to 16 columns, of which row i has the last counts[i], see `ZigzagCache.forward`. Returns its output.

        inputs: arguments of the model's forward, `position_ids` among them, no mask. One compiled graph where steps are compiled.
        """
        batch, q_len = new_tokens(inputs)
        inputs = {name: value for name, value in inputs.items() if name not in _FOR_GENERATE}
        return self.run(cache.forward(batch, q_len, ids=inputs.get("input_ids"), counts=counts), inputs)

    def run(self, forward: Forward, inputs: dict, head: bool = True):
        """A forward in one piece, which is not open yet. Returns the model's output, of its body alone without `head`."""
        inputs = inputs | {self.cache_name: forward.cache}
        with self._without_gradients(), self._together(), forward, attending(None), attending(forward):
            if self.compiled is not None and head and forward.is_step:
                return self.compiled(forward, inputs)
            with forward.piece(forward.total):
                return (self.behind("forward") if head else self.model.base_model)(**inputs)

    def generate(self, *args, **kwargs):
        kwargs = _as_of_an_assistant(kwargs)
        names = [name for name in inspect.signature(self.behind("generate")).parameters if name != "kwargs"]
        given = dict(zip(names, args, strict=False)) | kwargs
        configs = [given.get("generation_config"), self.model.generation_config]
        named = [given, *(vars(config) for config in configs if config is not None)]  # in the order in which generate() looks
        wanted = lambda name: next((each[name] for each in named if each.get(name) is not None), None)  # noqa: E731
        for name, instead in _OPTIONS.items():
            if wanted(name):
                raise ValueError(f"zigzag attention does not serve {name}={wanted(name)!r}: {instead}")
        own_loop = given.get("custom_generate")
        for name in ("streamer", "assistant_model") if callable(own_loop) else ():
            if given.get(name) is not None:
                where = "give it to zz.speculate(streamer=...)" if name == "streamer" else "leave one of them out"
                raise ValueError(f"generate() does not hand its {name} to custom_generate: {where}")
        if self.ranks is not None:
            args, kwargs = (), self._alike(given, wanted)
        ids = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
        if ids is not None:
            _check_tokens("input_ids", ids, 2)
        if given.get("inputs_embeds") is not None:
            _check_tokens("inputs_embeds", given["inputs_embeds"], 3)
        cache, kwargs = split_cache(kwargs)
        if cache is None and (wanted("use_cache") is not False or given.get("inputs_embeds") is not None):  # these need one
            cache = self.new_cache(rollback=getattr(own_loop, "rollback", 0))
        elif isinstance(cache, ZigzagCache) and not wanted("prefill_chunk_size"):
            self._keep_first(cache, self._known(given | {"input_ids": ids}), given)
        if isinstance(cache, ZigzagCache):
            cache.state.prompt_end = ids.shape[1] if ids is not None and wanted("prefill_chunk_size") else 0
        kwargs |= {} if cache is None else {self.cache_name: cache}
        return self.behind("generate")(*args, **kwargs)

    def _keep_first(self, cache: ZigzagCache, tokens: Tensor | None, given: dict) -> None:
        """Prepares a cache for a generate() of the whole conversation `tokens` [batch, n], as `_known` tells them."""
        if tokens is None:
            return
        cache.keep_first(tokens, given.get("attention_mask"), brings_images(given), self._print_of)
        if cache.get_seq_length():
            give_deltas(self.model, cache, max(1, cache.state.batch // len(tokens)))

    def _known(self, arguments: dict) -> Tensor | None:
        """[batch, n], by which the tokens of a call are told: their ids, or fingerprints if they come as embeddings."""
        embeddings = arguments.get("inputs_embeds")
        if embeddings is None:
            return arguments.get("input_ids")
        return fingerprints(embeddings.to(self.model.dtype))

    def _print_of(self, ids: Tensor) -> Tensor:
        embed = self.model.get_input_embeddings()
        with torch.no_grad():
            return fingerprints(embed(ids.to(next(embed.parameters()).device))).to(ids.device)

    def _alike(self, given: dict, wanted: Callable) -> dict:
        """The arguments of generate() with which all ranks choose the same tokens and stop together, by name."""
        if (seconds := wanted("max_time")) is not None:
            raise ValueError(
                f"max_time={seconds!r}: processes that share a model out have clocks of their own, and would stop one by one; "
                f"give stopping_criteria=[MaxTimeCriteria({seconds!r})], of which the first one's answer is taken by all"
            )
        self.ranks.draw_alike()
        criteria = [self.ranks.criterion(each) for each in given.get("stopping_criteria") or ()]
        return given | ({"stopping_criteria": StoppingCriteriaList(criteria)} if criteria else {})

    def new_cache(self, rollback: int = 0) -> ZigzagCache:
        """An empty cache that can take back at least `rollback` tokens."""
        options = self.cache_options | {"rollback": max(rollback, self.cache_options["rollback"])}
        if self.compiled is not None:
            return self.compiled.new_cache(self.plan, options)
        return ZigzagCache(self.model.config, self.plan, **options)

    def _check_arguments(self, kwargs: dict) -> None:
        """Raises TypeError or ValueError for what cannot be served as stock attention serves it."""
        model, name = self.model, type(self.model).__name__
        wants = kwargs.get("output_attentions")
        configs = (model.config, text_config(model.config))
        if wants or (wants is None and any(getattr(config, "output_attentions", False) for config in configs)):
            raise ValueError(f"zigzag attention does not serve output_attentions=True: {_OPTIONS['output_attentions']}")
        given = [argument for argument in TOKEN_ARGUMENTS if kwargs.get(argument) is not None]
        if len(given) != 1:
            which = "without input_ids and without inputs_embeds" if not given else "with input_ids and with inputs_embeds"
            raise ValueError(f"{name} was called {which}; you must specify exactly one of input_ids or inputs_embeds")
        _check_tokens(given[0], kwargs[given[0]], 3 if given[0] == "inputs_embeds" else 2)
        if model.training and getattr(model, "is_gradient_checkpointing", False):
            raise ValueError(
                f"{name} is in training mode with gradient checkpointing, which keeps no cache; zigzag attention is for "
                "inference: call model.eval()"
            )

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
        config, (given, kwargs) = text_config(self.model.config), split_cache(kwargs)
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
        given.state.mean_of_heads = None if self.ranks is None else self.ranks.mean
        layers = len(given.state.sources)
        if layers != config.num_hidden_layers:
            raise ValueError(f"the ZigzagCache is for {layers} layers, the model has {config.num_hidden_layers}")
        return given, kwargs | {self.cache_name: given}

    def _with_positions(self, cache: ZigzagCache, kwargs: dict) -> dict:
        """Some hybrid models count from 0 in every forward that is not told its positions."""
        if not cache.states or kwargs.get("position_ids") is not None or "position_ids" not in self.parameters:
            return kwargs
        columns, tokens = cache.state.columns, next(kwargs[name] for name in TOKEN_ARGUMENTS if kwargs.get(name) is not None)
        return kwargs | {"position_ids": torch.arange(columns, columns + tokens.shape[1], device=tokens.device)[None]}

    def _together(self):
        return nullcontext() if self.ranks is None else self.ranks.together()

    def _without_gradients(self):
        """no_grad, and one warning where gradients would have been recorded."""
        if not self.warned and torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters()):
            self.warned = True
            warnings.warn("zigzag attention is for inference: no gradients are recorded, as under torch.no_grad()", stacklevel=4)
        return torch.no_grad()


def _check_tokens(name: str, tokens, dims: int) -> None:
    shape = "[batch, tokens]" if dims == 2 else "[batch, tokens, hidden size]"
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got a {type(tokens).__name__}")
    if tokens.dim() != dims:
        raise ValueError(f"{name} must be {shape}, got {list(tokens.shape)}")


class _InFront:
    """Stands in the place of a model's method; looks like it to `inspect.signature`, which generate() reads."""

    def __init__(self, session: Session, name: str):
        functools.update_wrapper(self, session.behind(name))  # copies all attributes, a former one's session too
        self.session, self.name = session, name

    def __call__(self, *args, **kwargs):
        session = self.session
        return (session.behind(self.name) if session.is_removed else getattr(session, self.name))(*args, **kwargs)

    def __deepcopy__(self, memo: dict):
        """Of one that another object holds, a wrapper put around it: the copied model has one of its own in front."""
        return copy.deepcopy(self.session.behind(self.name), memo)


def _refusal(model: nn.Module, name: str):
    @functools.wraps(getattr(model, name))
    def refuse(*args, **kwargs):
        raise RuntimeError(f"a model with zigzag attention does not serve {name}(): {_INSTEAD[name]}")

    return refuse
