"""enable(model, plan): zigzag attention and a ZigzagCache behind every forward of a Hugging Face causal language model.

No code of transformers is replaced. A forward pre-hook gives the forward its cache (replacing the empty DynamicCache that
generate() makes) and opens it, a forward hook closes it; the attention and mask functions are registered through transformers'
public interfaces. With compile=True, `model.forward` is an object in front of the former one (compiled.py); the hooks run outside
of what is compiled.
"""

import inspect
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn
from transformers.cache_utils import DynamicCache

from ..cache import ZigzagCache
from ..planning.plan import Plan
from .attention import NAME, current
from .cache_argument import cache_parameter, split_cache, warn_if_untested
from .chunking import TOKEN_ARGUMENTS, begin, check_chunk, prefill_ahead
from .compiled import CompiledDecoding, check_compilable
from .families import check_family

_sessions: "WeakKeyDictionary[nn.Module, _Session]" = WeakKeyDictionary()


def enable(
    model: nn.Module, plan, max_len: int | None = None, prefill_chunk: int | str | None = None, compile: bool = False
) -> nn.Module:
    """Makes `model` run the plan: after this `model.generate(...)` keeps full caches for retrieval layers, rings for the others.

    Args:
        model: a transformers decoder-only language model (`AutoModelForCausalLM`). Served exactly or refused: see Raises.
        plan: `zigzag_ext.Plan` with one kind per layer.
        max_len: tokens per row of the caches made for calls without a cache; None lets them grow.
        prefill_chunk: most new tokens per row that go through the model at once, in forwards that ask for the logits of the last
            tokens only, as generate() does. Peak memory beside the KV then does not depend on the prompt; the result is that of
            one shot, in every turn of a conversation. "auto": from the free memory, at most 8192 tokens over all rows.
        compile: run each decode step (one new token per row) as one compiled graph, on a GPU as one captured CUDA graph; prompts
            stay eager. See below.

    Greedy search, sampling, beams, left-padded batches, `prefill_chunk_size` and several turns with one cache work as usual. Pass
    `cache=ZigzagCache(model.config, plan, max_len)` to keep a cache; its plan then wins. (generate() calls the argument
    `past_key_values` before transformers 5.24; forwards take either name.) Inference only. Tested with transformers 5.4 to 5.24;
    a newer one is warned of once.

    With `compile=True` the first step compiles, which takes from seconds to minutes; after that a step costs the host almost
    nothing, whatever the context length. Compiled again: for the second batch size (all later ones share that graph), for
    another plan, and where the arguments of the forward differ. On a GPU the graph is also captured (about a second) for each
    cache that is new, changes its batch size, or grows: give `max_len`, and it is captured once. Calls without a cache use
    the memory of the last such cache that is gone, so one capture serves one prompt after the other; `disable` frees it.
    Tokens agree with eager ones up to the rounding of compiled kernels.

    Returns:
        The model, for chaining. `disable(model)` undoes it.

    Raises:
        TypeError: `model` is no transformers model, `plan` no Plan, `max_len` or `prefill_chunk` no integer, `compile` no bool.
        ValueError: layer counts differ, `max_len` or `prefill_chunk` < 1, the dtype is not supported, or the family cannot be
            computed exactly (soft-capped logits, learned sink logits, native sliding windows, latent or linear attention,
            shared KV caches, encoders, unsupported head_dim or group size). With `compile`: several devices, or RoPE whose
            frequencies follow the length ("dynamic", "longrope").
        RuntimeError: already enabled, or the model does not take its attention from transformers' AttentionInterface, or its
            forward takes no cache. From the first forward: its layers do not get the cache. With `compile`, from the first step:
            the model's step cannot be one graph (for one, `output_hidden_states=True` cannot).

    Source: ZigzagAttention (https://arxiv.org/abs/2508.12407).
    """
    if not (isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "set_attn_implementation")):
        raise TypeError(f"model must be a transformers language model (AutoModelForCausalLM), got a {type(model).__name__}")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a zigzag_ext.Plan (Plan.load(path) reads a plan file), got {plan!r}")
    if model in _sessions:
        raise RuntimeError("zigzag attention is already enabled on this model: call zigzag_ext.disable(model) first")
    if not isinstance(compile, bool):
        raise TypeError(f"compile must be True or False, got {compile!r}")
    warn_if_untested()
    check_family(model)
    cache_name = cache_parameter(model)
    prefill_chunk = check_chunk(model, prefill_chunk)
    if compile:
        check_compilable(model)
    ZigzagCache(model.config, plan, max_len)
    previous = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise RuntimeError(f"{model.config.model_type} does not take its attention from transformers' AttentionInterface")
    _sessions[model] = _Session(model, cache_name, plan, max_len, prefill_chunk, previous)
    if compile:
        model.forward = CompiledDecoding(model)
    return model


def disable(model: nn.Module) -> nn.Module:
    """Gives `model` its former attention back. Raises RuntimeError if `enable` was not called on it. Returns the model."""
    if model not in _sessions:
        raise RuntimeError("zigzag attention is not enabled on this model")
    session = _sessions.pop(model)
    for hook in session.hooks:
        hook.remove()
    if isinstance(compiled := model.__dict__.get("forward"), CompiledDecoding):
        compiled.remove()
    model.set_attn_implementation(session.previous)
    return model


@contextmanager
def zigzag(model: nn.Module, plan, max_len: int | None = None, prefill_chunk: int | str | None = None, compile: bool = False):
    """`with zigzag(model, plan): model.generate(...)`: `enable` at the start, `disable` at the end."""
    enable(model, plan, max_len, prefill_chunk, compile)
    try:
        yield model
    finally:
        disable(model)


class _Session:
    """The hooks of one enabled model."""

    def __init__(
        self, model: nn.Module, cache_name: str, plan, max_len: int | None, prefill_chunk: int | str | None, previous: str
    ):
        self.cache_name = cache_name
        self.plan, self.max_len, self.prefill_chunk, self.previous = plan, max_len, prefill_chunk, previous
        parameters = inspect.signature(model.forward).parameters.values()
        self.parameters = tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)
        self.stand_ins: WeakKeyDictionary[DynamicCache, ZigzagCache] = WeakKeyDictionary()
        self.hooks = (
            model.register_forward_pre_hook(self.open, with_kwargs=True),
            model.register_forward_hook(self.close, with_kwargs=True, always_call=True),
        )

    def open(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        current.cache = None  # Ctrl-C skips `close`, so the last forward may have left its own
        kwargs = self.by_name(model, args, kwargs)
        if kwargs.get("output_attentions"):
            raise ValueError("zigzag attention has no attention weights to return: output_attentions must be off")
        if all(kwargs.get(name) is None for name in TOKEN_ARGUMENTS):
            raise ValueError(f"{type(model).__name__} was called without input_ids and without inputs_embeds; pass one of them")
        cache, kwargs = self.with_cache(model, kwargs)
        if self.prefill_chunk is not None:
            kwargs = prefill_ahead(model, cache, kwargs, self.prefill_chunk)
        begin(cache, kwargs)
        current.cache = cache
        return (), kwargs

    def by_name(self, model: nn.Module, args: tuple, kwargs: dict) -> dict:
        """All arguments by name; TypeError as Python would raise it for the call."""
        if not args:
            return kwargs
        name = f"{type(model).__name__}.forward()"
        if len(args) > len(self.parameters):
            raise TypeError(f"{name} takes {len(self.parameters)} positional arguments but {len(args)} were given")
        positional = dict(zip(self.parameters, args, strict=False))
        if twice := sorted(positional.keys() & kwargs.keys()):
            raise TypeError(f"{name} got multiple values for argument '{twice[0]}'")
        return kwargs | positional

    def close(self, model: nn.Module, args: tuple, kwargs: dict, output) -> None:
        cache = getattr(current, "cache", None)  # None if `open` raised
        if cache is not None:
            current.cache = None
            cache.end(failed=output is None)

    def new_cache(self, model: nn.Module) -> ZigzagCache:
        if isinstance(model.forward, CompiledDecoding):
            return model.forward.new_cache(self.plan, self.max_len)
        return ZigzagCache(model.config, self.plan, self.max_len)

    def with_cache(self, model: nn.Module, kwargs: dict) -> tuple[ZigzagCache, dict]:
        """The cache of this forward, and its arguments with that cache among them unless the caller wants none."""
        given, kwargs = split_cache(kwargs)
        use_cache = model.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
        if given is None and not use_cache:
            return ZigzagCache.without_memory(model.config, self.plan), kwargs
        cache = self.cache_for(model, given)
        return cache, kwargs | {self.cache_name: cache}

    def cache_for(self, model: nn.Module, given) -> ZigzagCache:
        """What stands for the cache that the caller has given, or not."""
        config = model.config
        if isinstance(given, ZigzagCache):
            if len(given.layers) != config.num_hidden_layers:
                raise ValueError(f"the ZigzagCache has {len(given.layers)} layers, the model has {config.num_hidden_layers}")
            return given
        if given is None:
            return self.new_cache(model)
        if type(given) is not DynamicCache:
            raise TypeError(f"a model with zigzag attention takes a ZigzagCache or no cache, got a {type(given).__name__}")
        if given in self.stand_ins:
            return self.stand_ins[given]
        if given.get_seq_length():
            raise ValueError(f"the DynamicCache holds {given.get_seq_length()} tokens of another attention; pass a ZigzagCache")
        cache = self.stand_ins[given] = self.new_cache(model)
        return cache
