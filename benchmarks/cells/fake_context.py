"""Caches as after a long prompt, of random contents: a prefill of 4M tokens would take hours and change nothing about a step."""

import torch
from transformers import DynamicCache, StaticCache

import zigzag_ext as zz
from zigzag_ext.attention import ops
from zigzag_ext.hf.cache_argument import cache_argument

MARGIN = 256  # tokens a cache can take beyond the context
FILL_CHUNK = 16384  # tokens made at a time: 64 MiB of keys and values of 8 heads of 128


def fake_zigzag(model, plan: zz.Plan, context: int, margin: int = MARGIN) -> zz.ZigzagCache:
    """A ZigzagCache as after a prompt of `context` tokens, of random contents: one real token allocates it."""
    cache = zz.ZigzagCache(model.config, plan, max_len=context + margin)
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), **cache_argument(model, cache))
    rows = cache.parts[0]
    rows.columns = rows.longest = context - 1
    cache.begin(1, 1)  # memory for the whole context
    for part in (part for layer in cache.layers for part in layer.parts):
        append_random(part, context)
    rows.q_len, rows.columns, rows.longest = 0, context, context
    cache.seq_lens.fill_(context)
    return cache


def append_random(part, context: int) -> None:
    """Appends normally distributed keys and values to the cache of a layer (or of some of its heads) until `context` are held.

    By the append op, so in every format. A ring gets its first and its last tokens, which are all that it would keep.
    """
    _, heads, _, width = part.keys.shape
    head_dim = width * 2 if part.keys.dtype == torch.uint8 else width  # int4: two codes a byte
    new = torch.empty(2, 1, heads, min(FILL_CHUNK, context), head_dim, dtype=part.dtype, device=part.device)
    held = torch.zeros(1, dtype=torch.int32, device=part.device)
    scales = {"k_scale": part.buffers.get("key_scales"), "v_scale": part.buffers.get("value_scales")}
    starts = {0, max(0, context - FILL_CHUNK)} if part.window else range(0, context, FILL_CHUNK)
    for start in sorted(starts):
        keys, values = new[..., : context - start, :].normal_()
        held.fill_(start)
        ops.append(keys, values, part.buffers["keys"], part.buffers["values"], held, sink=part.sink, window=part.window, **scales)


def fake_dynamic(model, context: int) -> DynamicCache:
    cache, config = DynamicCache(config=model.config), model.config
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), layer)
    return cache


def fake_static(model, context: int) -> StaticCache:
    cache, config = StaticCache(config=model.config, max_cache_len=context + MARGIN), model.config
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    return cache
