"""What image-text models have besides tokens: images (video, sound) in a call, and M-RoPE's offset, which follows a cache.

A model with M-RoPE keeps on itself how far the positions behind its latest prompt are from the number of tokens (`rope_deltas`).
Conversations on several caches take turns, so each cache has its own (`HeldTokens.deltas`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ..cache import ZigzagCache

_OF_TOKENS = ("inputs_embeds", "attention_mask", "position_ids")


def brings_images(kwargs: dict) -> bool:
    """Whether the arguments of a forward or of generate() have numbers besides those of tokens: pixels, features, sound."""
    others = (value for name, value in kwargs.items() if name not in _OF_TOKENS)
    return any(tensor.is_floating_point() for value in others for tensor in tensors_in(value))


def tensors_in(value) -> Iterator[Tensor]:
    """An argument that is a tensor, or the tensors in it: lists of images, outputs of encoders by name."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | Mapping):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(each)


def deltas_holder(model: nn.Module) -> nn.Module | None:
    """The part of a model with M-RoPE that has its `rope_deltas`; None of others."""
    return next((part for part in (model.base_model, model) if hasattr(part, "rope_deltas")), None)


def give_deltas(model: nn.Module, cache: ZigzagCache, copies: int = 1) -> None:
    """The model goes on from what `cache`, which holds tokens, has. copies: rows of the cache for each one of the call."""
    if (holder := deltas_holder(model)) is not None:
        deltas = cache.state.tokens.deltas
        holder.rope_deltas = deltas if deltas is None else deltas[::copies]


@contextmanager
def deltas_of(model: nn.Module, cache: ZigzagCache, kwargs: dict) -> Iterator[None]:
    """Around a forward on `cache`: the model goes on from what the cache has, and the cache keeps what it ends with.

    A prompt of tokens without position_ids starts anew: it would begin at what the model has of another cache.
    """
    holder, state = deltas_holder(model), cache.state
    if holder is None:
        yield
        return
    if state.columns:
        give_deltas(model, cache)
    elif kwargs.get("position_ids") is None and kwargs.get("input_ids") is not None:
        holder.rope_deltas = None
    yield
    if (deltas := holder.rope_deltas) is not None and len(deltas) < state.batch:
        deltas = deltas.repeat_interleave(state.batch // len(deltas), 0)  # of beams
    state.tokens.deltas = deltas
