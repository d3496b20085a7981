"""Compresses the prompt that a ZigzagCache holds: chooses for all retrieval layers, then lets go of the rest."""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...attention.store import LayerStore, in_normal_mode
from .method import PromptCompression
from .observed import Observed
from .select import attention_mass, select

if TYPE_CHECKING:
    from ..cache import ZigzagCache


def checked(method, sink: int, mixed: bool, most_observed: int | None = None, config=None) -> PromptCompression:
    """`method` for a plan of `sink` first tokens, some of whose layers are mixed. Raises TypeError or ValueError for no such one.

    most_observed: last tokens that a cache has kept queries of. config: the model's, where a cache is made.
    """
    if not isinstance(method, PromptCompression):
        raise TypeError(f"compress must be None or a method such as zigzag_ext.PromptWindows, got {method!r}")
    if getattr(config, "attn_logit_softcapping", None):
        raise ValueError(f"{config.model_type}: prompts of layers with soft-capped logits cannot be compressed")
    if getattr(config, "num_kv_shared_layers", None):  # only the queries of the layer that has the keys are observed
        raise ValueError(f"{config.model_type}: prompts in KV caches that layers share cannot be compressed")
    if method.group > 1 and method.per_head and mixed:
        raise ValueError("compress: layers with heads of both kinds choose alone; use group=1 or per_head=False")
    if most_observed is not None and method.observe > most_observed:
        raise ValueError(f"compress: the cache was made for observe={most_observed} last tokens, not for {method.observe}")
    return method.with_sink(sink)


@in_normal_mode
def compress(cache: "ZigzagCache", method: PromptCompression) -> bool:
    """Whether any token went. Waits for the device where some may. Before anything changes all choices are made."""
    state = cache.state
    stores = list(_retrieval_stores(cache))
    observed, budgets = state.observed, method.budgets(len(stores), state.longest)
    if not stores or not observed or min(budgets) >= state.longest:
        state.observed = {}
        return False
    lengths = next(iter(state.seq_lens.values()))[0].tolist()
    seen = next(iter(observed.values())).valid.tolist()  # a row whose observed tokens were all taken back stays as it is
    by_row = [method.budgets(len(stores), held) if n else [held] * len(stores) for held, n in zip(lengths, seen, strict=True)]
    chosen: list[tuple[Tensor, list[int]]] = []
    for number, (layer, store) in enumerate(stores):
        if number % method.group:
            index, kept = chosen[-1]
            chosen.append((index.to(store.device), kept))
        else:
            held = state.lengths_on(store.device)[0]
            mass = _mass(store, observed[layer].last(method.observe), held, max(lengths), method)
            chosen.append(select(method, mass, lengths, [row[number] for row in by_row], state.mean_of_heads))
    if all(kept == lengths for _, kept in chosen):
        state.observed = {}
        return False
    left_out = np.zeros_like(state.left_out)
    with state.change("compress()"):
        for (_, store), (index, kept) in zip(stores, chosen, strict=True):
            store.keep_slots(index, max(lengths))
            left_out[store.lengths] = np.subtract(lengths, kept)
            for device in state.seq_lens:
                state.lengths_on(device)[store.lengths].copy_(torch.tensor(kept, dtype=torch.int32))
        state.rows = state.rows.compressed(np.array(lengths, dtype=np.int64))
        state.left_out, state.capacity = left_out, 0  # what layers have memory for beyond it they keep
        state.compressed, state.observed = True, {}
    return True


def _retrieval_stores(cache: "ZigzagCache") -> Iterator[tuple[int, LayerStore]]:
    for layer in cache.attention_layers:
        yield from ((layer.index, store) for store in layer.stores if store.lengths)


def _mass(store: LayerStore, observed: Observed, lengths: Tensor, longest: int, method: PromptCompression) -> Tensor:
    """[batch, heads of the store, longest] float32, what `method` scores."""
    batch, num_kv_heads, _ = store.geometry
    heads = num_kv_heads if store.heads is None else len(store.heads)
    if method.scores == "none":
        return torch.zeros(batch, heads, longest, device=store.device)
    if store.heads is not None:
        q = observed.q.unflatten(1, (num_kv_heads, -1))[:, list(store.heads)].flatten(1, 2)
        observed = replace(observed, q=q)
    return attention_mass(observed, lambda start, stop: store.read(start, stop)[0], lengths, longest)
