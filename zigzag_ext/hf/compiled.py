"""Compiled decoding: a forward of one token per row runs as one compiled graph, on a GPU as one captured CUDA graph.

torch.compile sees the model's own forward with a StepCache in place of the cache; no copy of a family's code, no second path.
The CUDA graph is captured here rather than by mode="reduce-overhead": one graph per cache instead of one tree per function that
records anew for every other cache, outputs that stay valid, and no guards to evaluate between two tokens.
"""

import types
import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_map

from ..attention.store import in_normal_mode
from ..cache import ZigzagCache
from ..cache.forward import Forward, attending
from .cache_argument import cache_argument, split_cache
from .fuse_rope import fuse_rope
from .own_config import plain_name
from .step_cache import StepCache

_ROPE_BY_LENGTH = {"dynamic", "longrope"}


class CompiledDecoding:
    """Runs the decode steps of one model, each as its compiled `_Step`."""

    def __init__(self, model: nn.Module, forward: Callable):
        def step(inputs: dict):
            return forward(**inputs)

        # Compiled code is filed under its code object, and only a few variants of one are allowed: each model gets its own.
        own = types.FunctionType(step.__code__.replace(), step.__globals__, "step", None, step.__closure__)
        # Tuning writes products of one row as reductions, which reach the bandwidth that cuBLAS leaves, and fuses what surrounds
        # them: 88 kernels instead of 155 in a step of 8 Llama-3-8B layers on an H100, 2.57 ms instead of 2.84.
        options = {"triton.cudagraphs": False, "coordinate_descent_tuning": True}
        self.compiled = torch.compile(own, fullgraph=True, backend=_Backend(options))
        self.model = model
        # By the addresses that they were made for. A cache must not keep a model alive, nor a model the buffers of a cache.
        self.steps: weakref.WeakKeyDictionary[object, dict] = weakref.WeakKeyDictionary()
        self.spare: list[tuple] = []  # memory of the last cache that is gone

    def new_cache(self, plan, options: dict) -> ZigzagCache:
        """An empty cache, on the memory of the last one that is gone if it fits: what was compiled on it goes on serving."""
        model, cache = self.model, None
        if self.spare:
            cache = ZigzagCache.on_memory_of(*self.spare.pop())
        device = model.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
        if cache is None or not cache.lives_on(model.device, dtype):
            cache = ZigzagCache(model.config, plan, **options)
        weakref.finalize(cache, _keep_spare, self.spare, cache.memory).atexit = False
        return cache

    def __call__(self, forward: Forward, kwargs: dict):
        cache = forward.cache
        _, inputs = split_cache(kwargs)
        inputs.pop("attention_mask", None)
        steps, signature = self.steps.setdefault(cache.addresses, {}), _signature(inputs, forward)
        if signature not in steps:
            steps[signature] = _Step(self.model, self.compiled, forward, inputs)
        with forward.attending_all():
            return steps[signature](forward, inputs)


class _Backend:
    """Inductor, behind the passes of this package over the traced graph."""

    def __init__(self, options: dict):
        self.options = options

    def __call__(self, module: torch.fx.GraphModule, inputs: list) -> Callable:
        from torch._inductor.compile_fx import compile_fx  # takes seconds to import

        fuse_rope(module.graph)
        module.recompile()
        return compile_fx(module, inputs, config_patches=self.options)


class _Step:
    """A decode step on the buffers of one cache: inputs at fixed addresses, and on a GPU the graph captured with them.

    The GPU idles from one token to the replay of the next: what can wait comes behind the replay.
    """

    @in_normal_mode
    def __init__(self, model: nn.Module, compiled: Callable, forward: Forward, inputs: dict):
        self.model, self.compiled = model, compiled
        self.view = StepCache(forward)
        self.tensors = {
            name: value.clone(memory_format=torch.contiguous_format)  # strides of a slice would be compiled for
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }
        self.inputs = inputs | self.tensors | cache_argument(model, self.view)
        self.graph = self.output = self.captured_on = None
        self.last_forward = -1

    @torch.no_grad()
    def __call__(self, forward: Forward, inputs: dict):
        for name, static in self.tensors.items():
            static.copy_(inputs[name])
        self.view.refresh(forward)
        on_gpu = self.view.device.type == "cuda"
        output = self._replay(forward.state.num_forwards) if on_gpu else self._run()
        self.view.advance()

        def to_caller(leaf):
            if leaf is self.view:
                return forward.cache
            return leaf.clone() if on_gpu and isinstance(leaf, Tensor) else leaf  # the next replay overwrites it

        return tree_map(to_caller, output)

    @in_normal_mode
    def _run(self):
        try:
            with attending(self.view), plain_name(self.model):
                return self.compiled(self.inputs)
        except TorchDynamoException as error:
            name = type(self.model).__name__
            raise RuntimeError(f"{name} cannot decode as one compiled graph; enable it without compile=True. {error}") from error

    def _replay(self, forward: int):
        if self.last_forward + 1 != forward:  # the first step after a prompt
            self._capture_if_needed()
        self.last_forward = forward
        self.graph.replay()
        return self.output

    def _capture_if_needed(self) -> None:
        if self.captured_on == (now := _fingerprint(self.model)):
            return
        self.graph = self.output = self.captured_on = None
        device = self.view.device
        graph, stream, caller = torch.cuda.CUDAGraph(), torch.cuda.Stream(device), torch.cuda.current_stream(device)
        # Compiles and loads what a capture must not. Running the step twice is harmless: it appends at the lengths it is given.
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            self._run()
        caller.wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.output = self._run()
        self.graph, self.captured_on = graph, now


def check_compilable(model: nn.Module) -> None:
    """Raises ValueError by name for what can be served, but not as one graph."""
    family, devices = model.config.model_type, sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise ValueError(f"{family}: compile=True needs the whole model on one device, it is on {', '.join(devices)}")
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if found := kinds & _ROPE_BY_LENGTH:
            kind = found.pop()
            raise ValueError(f"{family}: compile=True does not serve '{kind}' RoPE ({name}): its frequencies follow the length")


def _keep_spare(spare: list, memory: tuple) -> None:
    spare[:] = [memory]


def _signature(inputs: dict, forward: Forward) -> Hashable:
    """What a captured step depends on besides the values of tensors. Raises TypeError for an input that cannot be compared."""
    device = forward.cache.layers[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    given = tuple((n, v.shape, v.dtype, v.device) if isinstance(v, Tensor) else (n, v) for n, v in inputs.items())
    for name, value, *_ in given:
        if not isinstance(value, Hashable):
            raise TypeError(f"a compiled decode step takes tensors and plain values, {name} is a {type(value).__name__}")
    return given, forward.padding is None, autocast


def _fingerprint(model: nn.Module) -> tuple:
    """Changes when weights move or modules are exchanged, which a captured graph would not notice."""
    tensors = tuple(t.data_ptr() for group in (model.parameters(), model.buffers()) for t in group)
    return tensors, tuple((id(m), m.training, *m._forward_pre_hooks, *m._forward_hooks) for m in model.modules())
