"""Compresses the prompt that a ZigzagCache holds: chooses for all retrieval layers, then lets go of the rest."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...attention.store import LayerStore, in_normal_mode
from .select import attention_mass, select

if TYPE_CHECKING:
    from ..cache import ZigzagCache
    from .method import PromptCompression


@in_normal_mode
def compress(cache: "ZigzagCache") -> bool:
    """Whether any token went. Waits for the device where some may. Before anything changes all choices are made."""
    state, method = cache.state, cache.state.compression
    stores = list(_retrieval_stores(cache))
    observed, budgets = state.observed, method.budgets(len(stores), state.longest)
    if not stores or not observed or min(budgets) >= state.longest:
        state.observed = {}
        return False
    lengths = next(iter(state.seq_lens.values()))[0].tolist()
    by_row = [method.budgets(len(stores), held) for held in lengths]
    chosen: list[tuple[Tensor, list[int]]] = []
    for number, (layer, store) in enumerate(stores):
        if number % method.group:
            index, kept = chosen[-1]
            chosen.append((index.to(store.device), kept))
        else:
            mass = _mass(store, *observed[layer], state.lengths_on(store.device)[0], max(lengths), method)
            chosen.append(select(method, mass, lengths, [row[number] for row in by_row]))
    if all(kept == lengths for _, kept in chosen):
        state.observed = {}
        return False
    with state.change("compress()"):
        for (_, store), (index, kept) in zip(stores, chosen, strict=True):
            store.keep_slots(index, max(lengths))
            for device in state.seq_lens:
                state.lengths_on(device)[store.lengths].copy_(torch.tensor(kept, dtype=torch.int32))
        state.rows = state.rows.compressed(np.array(lengths, dtype=np.int64))
        state.capacity = max(lengths)  # what layers have memory for beyond it they keep
        state.compressed, state.observed = True, {}
    return True


def _retrieval_stores(cache: "ZigzagCache") -> Iterator[tuple[int, LayerStore]]:
    for layer in cache.layers:
        yield from ((layer.index, store) for store in layer.stores if store.lengths)


def _mass(store: LayerStore, q: Tensor, scale: float, lengths: Tensor, longest: int, method: "PromptCompression") -> Tensor:
    """[batch, heads of the store, longest] float32, what `method` scores."""
    batch, num_kv_heads, _ = store.geometry
    heads = num_kv_heads if store.heads is None else len(store.heads)
    if method.scores == "none":
        return torch.zeros(batch, heads, longest, device=store.device)
    if store.heads is not None:
        q = q.unflatten(1, (num_kv_heads, -1))[:, list(store.heads)].flatten(1, 2)
    return attention_mass(q, lambda start, stop: store.read(start, stop)[0], lengths, longest, scale)
