"""Compiled decoding: a forward of few tokens per row runs as one compiled graph, on a GPU as one captured CUDA graph.

torch.compile sees the model's own forward with a StepCache in place of the cache; no copy of a family's code, no second path.
The CUDA graph is captured here rather than by mode="reduce-overhead": one graph per cache instead of one tree per function that
records anew for every other cache, outputs that stay valid, and no guards to evaluate between two tokens.
"""

import types
import weakref
from collections.abc import Callable, Hashable, Iterable
from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._pytree import tree_map

from ..attention.store import in_normal_mode
from ..cache import ZigzagCache
from ..cache.attending import attending
from ..cache.forward import Forward
from ..planning.waiting import waiting
from .cache_argument import cache_argument, split_cache
from .fuse_rope import fuse_rope
from .ranks import Ranks, local_tensors
from .step_cache import StepCache

_ROPE_BY_LENGTH = {"dynamic", "longrope"}
_GRIDS = ("image_grid_thw", "video_grid_thw")  # of the prompt's images: generate() hands them to steps, which have positions


class CompiledDecoding:
    """Runs the decode steps of one model, each as its compiled `_Step`."""

    def __init__(self, model: nn.Module, forward: Callable):
        self.model, self.forward = model, forward
        self.compiled: dict[Hashable, Callable] = {}  # by what a step is: its columns, how it reads a cache
        # By the addresses that they were made for. A cache must not keep a model alive, nor a model the buffers of a cache.
        self.steps: weakref.WeakKeyDictionary[object, dict] = weakref.WeakKeyDictionary()
        self.spare: list[tuple] = []  # memory of the last cache that is gone
        self.model_is: tuple | None = None  # its fingerprint, as of `last`
        self.last: tuple | None = None  # the cache's addresses and number of the latest forward that was a compiled step
        self.ranks, self.last_step = Ranks.of(model), None  # last_step: a reference to the latest that ran

    def new_cache(self, plan, options: dict) -> ZigzagCache:
        """An empty cache, on the memory of the last one that is gone if it fits: what was compiled on it goes on serving."""
        model, cache = self.model, None
        if self.spare:
            cache = ZigzagCache.on_memory_of(*self.spare.pop())
        device = model.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
        fits = cache is not None and cache.lives_on(model.device, dtype) and cache.rollback >= options["rollback"]
        # When a cache is gone is up to Python's collector. All ranks must find room for as many tokens, or they grow one by one.
        if self.ranks is not None and not self.ranks.same(cache.state.capacity if fits else -1):
            fits = False
        if not fits:
            cache = ZigzagCache(model.config, plan, **options)
        weakref.finalize(cache, _keep_spare, self.spare, cache.memory).atexit = False
        return cache

    def __call__(self, forward: Forward, kwargs: dict):
        cache = forward.cache
        _, inputs = split_cache(kwargs)
        for name in ("attention_mask", *(_GRIDS if inputs.get("position_ids") is not None else ())):
            inputs.pop(name, None)
        kind = (forward.total, None, forward.padding is None)
        step = self._step(cache, kind, inputs, lambda: StepCache.of(forward))
        with forward.attending_all():
            step.view.refresh(forward)
            output = step(inputs, self._model_for(step, cache, forward.state.num_forwards - 1), self._beside(cache))
            step.view.advance()
        return tree_map(lambda leaf: cache if leaf is step.view else step.to_caller(leaf), output)

    def draft(self, cache: ZigzagCache, view: StepCache, inputs: dict) -> Tensor:
        """Logits [batch, vocab] of a step on a view of a cache, which no forward of it counts. One view per reading and cache."""
        step = self._step(cache, (1, view.through, False), inputs, lambda: view)
        if step.view is not view:
            raise ValueError("a cache is drafted on through one view for each sink and window")
        model_is = self._model_for(step, cache, cache.state.num_forwards)
        return step.to_caller(step(inputs, model_is, self._beside(cache)).logits[:, -1])

    def _beside(self, cache: ZigzagCache) -> Iterable["_Step"]:
        return self.steps[cache.addresses].values()

    @in_normal_mode
    def _step(self, cache: ZigzagCache, kind: tuple, inputs: dict, view: Callable[[], StepCache]) -> "_Step":
        steps = self.steps.setdefault(cache.addresses, {})
        signature = (kind, *_signature(inputs, cache.attention_layers[0].device.type))
        if signature not in steps:
            steps[signature] = _Step(self.model, self._compiled(kind[:2]), view(), inputs)
        return steps[signature]

    def _compiled(self, kind: tuple) -> Callable:
        forward = self.forward

        def step(inputs: dict):
            return forward(**inputs)

        if kind not in self.compiled:
            # Compiled code is filed under its code object, and only a few variants of one are allowed: each gets its own.
            own = types.FunctionType(step.__code__.replace(), step.__globals__, "step", None, step.__closure__)
            # Tuning writes products of one row as reductions, which reach the bandwidth that cuBLAS leaves, and fuses what
            # surrounds them: 88 kernels instead of 155 in a step of 8 Llama-3-8B layers on an H100, 2.57 ms instead of 2.84.
            options = {"triton.cudagraphs": False, "coordinate_descent_tuning": True}
            self.compiled[kind] = torch.compile(own, fullgraph=True, backend=_Backend(options))
        return self.compiled[kind]

    def _model_for(self, step: "_Step", cache: ZigzagCache, before: int) -> tuple | None:
        """The model's fingerprint, looked at again unless the forward `before` this step was a compiled one; None on a CPU.

        A capture runs the step once more. Ranks that share the model out must all do so where one has to: the step of each then
        counts as never captured. They ask one another where one of them may have to, not for a step that follows itself.
        """
        if not self._captures(cache):
            return None
        is_first = self.last != (weakref.ref(cache.addresses), before)
        if is_first:
            self.model_is = fingerprint(self.model)
        asks = self.ranks is not None and (is_first or self.last_step is None or self.last_step() is not step)
        if asks and self.ranks.any(step.captured_on != self.model_is):
            step.captured_on = None
        self.last, self.last_step = (weakref.ref(cache.addresses), cache.state.num_forwards), weakref.ref(step)
        return self.model_is

    @staticmethod
    def _captures(cache: ZigzagCache) -> bool:
        return cache.attention_layers[0].device.type == "cuda"


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
    def __init__(self, model: nn.Module, compiled: Callable, view: StepCache, inputs: dict):
        self.model, self.compiled, self.view = model, compiled, view
        self.tensors = {
            name: value.clone(memory_format=torch.contiguous_format)  # strides of a slice would be compiled for
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }
        self.inputs = inputs | self.tensors | cache_argument(model, self.view)
        self.graph = self.output = self.captured_on = self.lent = None
        self.has_run = False

    @torch.no_grad()
    def __call__(self, inputs: dict, model_is: tuple | None, beside: Iterable["_Step"]):
        """The model's output, on a GPU at the addresses of the graph.

        model_is: the model's fingerprint; None on a CPU. beside: all steps on the same cache, of which one at a time runs.
        """
        for name, static in self.tensors.items():
            static.copy_(inputs[name])
        if model_is is None:
            return self._run()
        if self.captured_on != model_is:
            self._capture(beside)
            self.captured_on = model_is
        self.graph.replay()
        return self.output

    def to_caller(self, leaf):
        return leaf.clone() if self.graph is not None and isinstance(leaf, Tensor) else leaf  # the next replay overwrites it

    @in_normal_mode
    def _run(self):
        told = nullcontext() if self.has_run else waiting("compiling the decode step, once; seconds to minutes")
        try:
            with told, attending(self.view):
                output = self.compiled(self.inputs)
        except TorchDynamoException as error:
            name = type(self.model).__name__
            raise RuntimeError(f"{name} cannot decode as one compiled graph; give compile=False instead. {error}") from error
        self.has_run = True
        return output

    def _capture(self, beside: Iterable["_Step"]) -> None:
        """Into the memory that the graphs beside it have: a graph needs nothing between its replays but where its output is."""
        self.graph = self.output = self.captured_on = None
        device, other = self.view.device, next((step for step in beside if step.graph is not None), None)
        self.lent, pool = (_LentStream(device), None) if other is None else (other.lent, other.graph.pool())
        graph, stream, caller = torch.cuda.CUDAGraph(), self.lent.stream, torch.cuda.current_stream(device)
        # Compiles and loads what a capture must not. Running the step twice is harmless: it appends at the lengths it is given.
        stream.wait_stream(caller)
        with torch.cuda.stream(stream), self.view.states_kept():
            self._run()
        caller.wait_stream(stream)
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.output = self._run()
        self.graph = graph


class _LentStream:
    """A stream for the captures on one cache, which goes to another cache when the last step with it is gone.

    Libraries keep memory for every stream that they have seen: cuBLAS 32 MiB on Hopper.
    """

    spare: ClassVar[dict[torch.device, list[torch.cuda.Stream]]] = {}

    def __init__(self, device: torch.device):
        spare = self.spare.setdefault(device, [])
        try:
            self.stream = spare.pop()  # in one step: other threads capture, too
        except IndexError:
            self.stream = torch.cuda.Stream(device)
        weakref.finalize(self, spare.append, self.stream).atexit = False


def check_compilable(model: nn.Module) -> None:
    """Raises ValueError by name for what can be served, but not as one graph."""
    family, devices = model.config.model_type, sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise ValueError(f"{family}: compile=True needs the whole model on one device, it is on {', '.join(devices)}")
    if found := rope_by_length(model):
        raise ValueError(f"{family}: compile=True does not serve {found}: its frequencies follow the length")


def rope_by_length(model: nn.Module) -> str | None:
    """Which RoPE of the model takes its frequencies from the longest row of a forward; None: none does."""
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if found := kinds & _ROPE_BY_LENGTH:
            return f"'{found.pop()}' RoPE ({name})"
    return None


def _keep_spare(spare: list, memory: tuple) -> None:
    spare[:] = [memory]


def _signature(inputs: dict, device: str) -> tuple:
    """What a captured step depends on besides the values of tensors. Raises TypeError for an input that cannot be compared."""
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    given = tuple((n, v.shape, v.dtype, v.device) if isinstance(v, Tensor) else (n, v) for n, v in inputs.items())
    for name, value, *_ in given:
        if not isinstance(value, Hashable):
            raise TypeError(f"a compiled decode step takes tensors and plain values, {name} is a {type(value).__name__}")
    return given, autocast


def fingerprint(model: nn.Module) -> tuple:
    """Changes when weights move, modules are exchanged or something is set in one, which a captured graph would not notice."""
    tensors = tuple(local.data_ptr() for _, local in local_tensors(model))
    modules = tuple((id(m), m.training, *m._forward_pre_hooks, *m._forward_hooks, _set_in(m)) for m in model.modules())
    return tensors, modules


_OF_ALL_MODULES = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, type(None))


def _set_in(module: nn.Module) -> frozenset:
    """Numbers, names and functions among the attributes of a module: scales, PEFT's active and merged adapters."""
    attributes = vars(module)
    return frozenset((name, _plain(attributes[name])) for name in attributes.keys() - _OF_ALL_MODULES)


def _plain(value) -> Hashable:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return tuple((_plain(key), _plain(each)) for key, each in value.items())
    if isinstance(value, (list, tuple, set)):
        return tuple(map(_plain, value))
    return id(value) if isinstance(value, (types.FunctionType, types.MethodType)) else None
