"""Runs a Hugging Face model with one's own attention function, the same in every layer: for scoring heads and head-level plans.

It goes through the "zigzag" attention interface: a stand-in for the cache hands each layer's queries, keys and values on. So
everything that `enable` refuses is refused here too, and gradients flow, since nothing below is a compiled kernel.
"""

from collections.abc import Callable
from contextlib import contextmanager

from torch import Tensor, nn

from ..hf.attention import NAME, current
from ..hf.cache_argument import split_cache
from ..hf.families import check_family

# attend(layer, query [batch, num_q_heads, n, head_dim], key and value [batch, num_kv_heads, n, head_dim], scale) -> like query
Attend = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]


@contextmanager
def probe(model: nn.Module, attend: Attend):
    """`with probe(model, attend): model(ids, use_cache=False)`: every layer's attention is `attend`, without cache or padding.

    Raises:
        RuntimeError: zigzag attention is enabled on the model already.
        ValueError: the family cannot be computed exactly; in the forward: padding, a cache or attention weights were asked for.
    """
    previous = model.config._attn_implementation
    if previous == NAME:
        raise RuntimeError("zigzag attention is enabled on this model: call zigzag_ext.disable(model) first")
    check_family(model)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise RuntimeError(f"{model.config.model_type} does not take its attention from transformers' AttentionInterface")
    hook = model.register_forward_pre_hook(_check_arguments, with_kwargs=True)
    current.cache = _Probe(attend, model.config.num_hidden_layers)
    try:
        yield model
    finally:
        current.cache = None
        hook.remove()
        model.set_attn_implementation(previous)


class _Probe:
    def __init__(self, attend: Attend, num_layers: int):
        self.layers = [_Layer(attend, layer) for layer in range(num_layers)]


class _Layer:
    def __init__(self, attend: Attend, layer: int):
        self.function, self.layer = attend, layer

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        return self.function(self.layer, query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)


def _check_arguments(model: nn.Module, args: tuple, kwargs: dict) -> None:
    cache, others = split_cache(kwargs)
    if cache is not None or others.get("attention_mask") is not None:
        raise ValueError("a probed model takes rows of one length and no cache: attention_mask and the cache must be None")
    if kwargs.get("use_cache") is not False:
        raise ValueError("a probed model keeps no cache: pass use_cache=False")
