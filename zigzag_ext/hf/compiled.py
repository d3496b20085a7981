"""Compiled decoding: a forward of one token per row runs as one compiled graph, on a GPU as one captured CUDA graph.

torch.compile sees the model's own forward with a StepCache in place of the cache; no copy of a family's code, no second path.
The CUDA graph is captured here rather than by mode="reduce-overhead": one graph per cache instead of one tree per function that
records anew for every other cache, outputs that stay valid, and no guards to evaluate between two tokens.
"""

import functools
import types
import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..cache import ZigzagCache
from .attention import current
from .step_cache import StepCache


class CompiledDecoding:
    """Stands before the forward of one model: decode steps go to their compiled `_Step`, all other calls to `forward`."""

    def __init__(self, model: nn.Module, forward: Callable):
        def step(inputs: dict):
            return forward(**inputs)

        # Compiled code is filed under its code object, and only a few variants of one are allowed: each model gets its own.
        own = types.FunctionType(step.__code__.replace(), step.__globals__, "step", None, step.__closure__)
        self.compiled = torch.compile(own, fullgraph=True, options={"triton.cudagraphs": False})
        self.forward, self.fingerprint = forward, functools.partial(_fingerprint, model)
        self.trains = lambda: torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters())
        self.retired: list[tuple] = []  # parts of the last cache that is gone
        functools.update_wrapper(self, forward)  # generate() reads the signature

    def new_cache(self, config, plan, max_len: int | None) -> ZigzagCache:
        """An empty cache, on the memory of the last one that is gone if there is one: what was compiled on it goes on serving."""
        cache = ZigzagCache.from_parts(*self.retired.pop()) if self.retired else ZigzagCache(config, plan, max_len)
        finalizer = weakref.finalize(cache, _retire, self.retired, cache.parts)
        finalizer.atexit = False
        return cache

    def __call__(self, *args, **kwargs):
        cache = getattr(current, "cache", None)
        if cache is None or args or not cache.decodes or self.trains():
            return self.forward(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in ("attention_mask", "past_key_values")}
        with torch.inference_mode(False), torch.no_grad():
            steps = cache.steps.setdefault(self, {})
            signature = _signature(kwargs, cache)
            if signature not in steps:
                steps[signature] = _Step(self.compiled, self.fingerprint, cache, kwargs)
            output = steps[signature](cache, kwargs)
        cache.mark_attended()
        return output


class _Step:
    """A decode step of one cache: fixed inputs, and on a GPU the graph that was captured with them."""

    def __init__(self, compiled: Callable, fingerprint: Callable, cache: ZigzagCache, kwargs: dict):
        self.compiled, self.fingerprint = compiled, fingerprint
        self.view = StepCache(cache, cache.padding)
        self.tensors = {name: value.clone() for name, value in kwargs.items() if isinstance(value, Tensor)}
        self.inputs = kwargs | self.tensors | {"past_key_values": self.view}
        self.device = self.view.layers[0].keys.device
        self.graph = self.output = self.captured_with = None
        self.next_column = None  # the cache's length if nothing but this step has run on it since

    def __call__(self, cache: ZigzagCache, kwargs: dict):
        columns = cache.get_seq_length()
        for name, static in self.tensors.items():
            static.copy_(kwargs[name])
        self.view.refresh(columns, cache.padding)
        if self.device.type == "cpu":
            output, copy = self._run(), False
        else:
            self._replay(unchanged=columns == self.next_column)
            output, copy = self.output, True
        self.next_column = columns + 1
        return tree_map(
            lambda leaf: cache if leaf is self.view else leaf.clone() if copy and isinstance(leaf, Tensor) else leaf, output
        )

    def _run(self):
        current.cache, cache = self.view, current.cache
        try:
            return self.compiled(self.inputs)
        finally:
            current.cache = cache

    def _replay(self, unchanged: bool) -> None:
        if not unchanged and self.captured_with != (fingerprint := self.fingerprint()):
            self._capture()
            self.captured_with = fingerprint
        self.graph.replay()

    def _capture(self) -> None:
        """The run before the capture compiles and loads everything. A step may run twice: it appends at the lengths it is given."""
        stream, caller = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        self.graph = self.output = None
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            self._run()
        caller.wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.output = self._run()


def _retire(retired: list, parts: tuple) -> None:
    retired[:] = [parts]


def _signature(kwargs: dict, cache: ZigzagCache) -> Hashable:
    """What a captured step depends on besides values of tensors."""
    device = cache.layers[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    shapes = tuple((n, v.shape, v.dtype, v.device) if isinstance(v, Tensor) else (n, v) for n, v in kwargs.items())
    return shapes, cache.padding is None, autocast


def _fingerprint(model: nn.Module) -> tuple:
    """Changes when weights move or modules are exchanged, which a captured graph would not notice."""
    tensors = tuple(t.data_ptr() for group in (model.parameters(), model.buffers()) for t in group)
    modules = tuple((id(m), m.training, *m._forward_pre_hooks, *m._forward_hooks) for m in model.modules())
    return tensors, modules
