"""Caches as after a long prompt, of random contents: a prefill of 4M tokens would take hours and change nothing about a step."""

import torch
from transformers import DynamicCache, StaticCache

import zigzag_ext as zz
from zigzag_ext.attention import ops
from zigzag_ext.cache.rows import Rows
from zigzag_ext.hf.cache_argument import cache_argument

MARGIN = 256  # tokens a cache can take beyond the context
FILL_CHUNK = 16384  # tokens made at a time: 64 MiB of keys and values of 8 heads of 128


def fake_zigzag(model, plan: zz.Plan, context: int, margin: int = MARGIN, batch: int = 1, rollback: int = 0) -> zz.ZigzagCache:
    """A ZigzagCache as after a prompt of `context` tokens, of random contents: one real token allocates it."""
    cache = zz.ZigzagCache(model.config, plan, max_len=context + margin, rollback=rollback)
    model(torch.zeros(batch, 1, dtype=torch.long, device=model.device), **cache_argument(model, cache))
    state = cache.state
    cache.reserve(context - 1)
    for store in cache.stores:
        append_random(store, context)
    state.tokens.note(None, None, batch, context, model.device, 0)
    state.rows = Rows.empty(batch).followed_by(context)
    cache.seq_lens.fill_(context)
    return cache


def append_random(store, context: int) -> None:
    """Appends normally distributed keys and values to the cache of a layer (or of some of its heads) until `context` are held.

    By the append op, so in every format. A ring gets its first and its last tokens, which are all that it would keep.
    """
    batch, heads, _, width = store.keys.shape
    head_dim = width * 2 if store.keys.dtype == torch.uint8 else width  # int4: two codes a byte
    new = torch.empty(2, batch, heads, min(FILL_CHUNK, context), head_dim, dtype=store.dtype, device=store.device)
    held = torch.zeros(batch, dtype=torch.int32, device=store.device)
    caches = store.caches
    starts = {0, max(0, context - FILL_CHUNK)} if store.window else range(0, context, FILL_CHUNK)
    for start in sorted(starts):
        keys, values = new[..., : context - start, :].normal_()
        held.fill_(start)
        ops.append(keys, values, *caches[:2], held, sink=store.sink, window=store.window, **caches.scales)


def fake_dynamic(model, context: int) -> DynamicCache:
    cache, config = DynamicCache(config=model.config), model.config
    for index, layer in enumerate(cache.layers):
        held = min(context, layer.sliding_window - 1) if layer.is_sliding else context
        shape = (1, config.num_key_value_heads, held, config.head_dim)
        cache.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), index)
        if layer.is_sliding:
            layer.cumulative_length = context
    return cache


def fake_static(model, context: int) -> StaticCache:
    cache, config = StaticCache(config=model.config, max_cache_len=context + MARGIN), model.config
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
        if layer.is_sliding:
            layer.cumulative_length_int = context
    return cache
