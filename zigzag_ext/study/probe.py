"""Runs a Hugging Face model with one's own attention function in every full-attention layer, for scores and plans of heads.

It goes through the "zigzag" attention interface: a stand-in for the cache hands each layer's queries, keys and values on. So
everything that `enable` refuses is refused here too, and gradients flow, since nothing below is a compiled kernel.
"""

from collections.abc import Callable
from contextlib import contextmanager

from torch import Tensor, nn

from ..attention.chunk import NO_TERMS, LogitTerms
from ..cache.attending import attending
from ..hf.attention import NAME
from ..hf.cache_argument import split_cache
from ..hf.families import check_family
from ..hf.own_config import set_implementation
from ..planning.layers import kv_sources, text_config
from ..planning.native import native_windows
from .torch_attention import banded

# layer: its number among the full-attention layers, those that read the keys of another one included.
# attend(layer, query [batch, num_q_heads, n, head_dim], key and value [batch, num_kv_heads, n, head_dim], scale) -> like query
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


@contextmanager
def probe(model: nn.Module, attend: Attend):
    """`with probe(model, attend): model(ids, use_cache=False)`: full attention is `attend`, without cache or padding.

    Raises:
        RuntimeError: zigzag attention is enabled on the model already.
        ValueError: the family cannot be computed exactly; in the forward: padding, a cache or attention weights were asked for.
    """
    previous = text_config(model.config)._attn_implementation
    if previous == NAME:
        raise RuntimeError("zigzag attention is enabled on this model: call zigzag_ext.disable(model) first")
    check_family(model)
    set_implementation(model, NAME)
    hook = model.register_forward_pre_hook(_check_arguments, with_kwargs=True)
    try:
        with attending(None), attending(_Probe(attend, model.config)):
            yield model
    finally:
        hook.remove()
        set_implementation(model, previous)


class _Probe:
    """Native windows attend by themselves; the full-attention layers, numbered without them, by `function`."""

    def __init__(self, function: Attend, config):
        self.function, self.sources = function, kv_sources(config)
        windows = native_windows(config)
        self.windows = [windows[source] for source in self.sources]
        self.numbers = [self.windows[:layer].count(None) for layer in range(len(self.windows))]
        self.shared: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values that later layers read

    def native_window(self, layer: int) -> int:
        return self.windows[layer] or 0

    def was_given(self, layer: int) -> bool:
        return True

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None, terms: LogitTerms) -> Tensor:
        if terms != NO_TERMS:
            raise ValueError(
                "soft-capped logits and learned sink logits are not computed here: use a method that asks for answers"
            )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        source = self.sources[layer]
        if source != layer:
            key, value = self.shared[source]  # see `SharedKeys`
        elif self.sources.count(layer) > 1:
            self.shared[layer] = key, value
        if window := self.windows[layer]:
            return banded(query, key, value, scale, 0, window)
        return self.function(self.numbers[layer], query, key, value, scale)


def _check_arguments(model: nn.Module, args: tuple, kwargs: dict) -> None:
    cache, others = split_cache(kwargs)
    if cache is not None or others.get("attention_mask") is not None:
        raise ValueError("a probed model takes rows of one length and no cache: attention_mask and the cache must be None")
    if kwargs.get("use_cache") is not False:
        raise ValueError("a probed model keeps no cache: pass use_cache=False")
