"""DuoAttention's way through a decode step, re-created to compare with: what a plan per head costs with its own dispatch.

Source: https://github.com/mit-han-lab/duo-attention (duo_attn/patch/llama.py and static_kv_cache.py). As there: the weights of
q, k, v and o are permuted, retrieval heads first; retrieval heads have a static buffer [batch, tokens, heads, head_dim]
that new tokens are copied into; streaming heads have sink + recent tokens, joined with the new ones by torch.cat and copied back
whole each step; two attention calls, joined by torch.cat. Not as there: norms, RoPE and the rest of the layer are transformers'
(theirs are FlashInfer's), attention is torch's flash attention (theirs is flash-attn's). Decoding only; the window counts the new
token, as everywhere in this package: recent = window - 1 cached tokens.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin

import zigzag_ext as zz

NAME = "duo_recreation"


class DuoLayer(CacheLayerMixin):
    """Both caches of a layer, of random contents as after `context` tokens: [1, tokens, heads, head_dim]."""

    is_sliding = False

    def __init__(self, full: int, streaming: int, head_dim: int, context: int, room: int, sink: int, window: int, like: Tensor):
        super().__init__()
        self.sink, self.recent, self.seen = sink, window - 1, context
        self.full_heads, held = full, min(context, sink + window - 1)

        def pair(tokens: int, heads: int) -> list[Tensor]:
            return [torch.randn(1, tokens, heads, head_dim, dtype=like.dtype, device=like.device) for _ in "kv"]

        self.full, self.streaming, self.held = pair(context + room, full), pair(sink + window - 1, streaming), held
        self.is_initialized = True

    @property
    def memory_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in (*self.full, *self.streaming))

    def lazy_initialization(self, *args) -> None:
        raise RuntimeError("the re-creation is made with its contents")

    def update(self, keys: Tensor, values: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in older transformers

    def put_full(self, new: list[Tensor]) -> list[Tensor]:
        """Copies the new tokens behind the held ones; returns all."""
        q_len = new[0].shape[1]
        for buffer, tokens in zip(self.full, new, strict=True):
            buffer[:, self.seen : self.seen + q_len].copy_(tokens)
        return [buffer[:, : self.seen + q_len] for buffer in self.full]

    def join_streaming(self, new: list[Tensor]) -> list[Tensor]:
        return [torch.cat([buffer[:, : self.held], tokens], 1) for buffer, tokens in zip(self.streaming, new, strict=True)]

    def compress_streaming(self, joined: list[Tensor]) -> None:
        """Keeps sink and recent tokens of the joined ones: copied whole."""
        size, most = joined[0].shape[1], self.sink + self.recent
        for buffer, tokens in zip(self.streaming, joined, strict=True):
            if size <= most:
                buffer[:, :size].copy_(tokens)
            else:
                buffer[:, : self.sink].copy_(tokens[:, : self.sink])
                buffer[:, self.sink :].copy_(tokens[:, size - self.recent :])
        self.held = min(size, most)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Decoding: q [1, 1, heads, head_dim], one query that sees all of k and v [1, tokens, kv_heads, head_dim]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)


def _attention(module, query, key, value, attention_mask, scaling=None, **kwargs) -> tuple[Tensor, None]:
    layer: DuoLayer = module.duo_layer
    if query.shape[2] != 1:
        raise ValueError(f"the re-creation decodes one token at a time, got {query.shape[2]}")
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    full, queries = layer.full_heads, layer.full_heads * (q.shape[2] // k.shape[2])
    outs = []
    if full:
        outs.append(_attend(q[:, :, :queries], *layer.put_full([k[:, :, :full], v[:, :, :full]]), scaling))
    if full < k.shape[2]:
        joined = layer.join_streaming([k[:, :, full:], v[:, :, full:]])
        outs.append(_attend(q[:, :, queries:], *joined, scaling))
        layer.compress_streaming(joined)
    layer.seen += 1
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 2)), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def orders(plan: zz.Plan, kv_heads: int) -> list[list[int]]:
    """KV heads of every layer, retrieval heads first."""
    return [sorted(range(kv_heads), key=lambda head: not kinds[head]) for kinds in plan.retrieval_heads(kv_heads)]


@contextmanager
def duo_weights(model: nn.Module, plan: zz.Plan):
    """The model with its heads permuted so that retrieval heads come first, and this attention; undone at the end."""
    config, previous = model.config, model.config._attn_implementation
    head_dim, group = model.model.layers[0].self_attn.head_dim, config.num_attention_heads // config.num_key_value_heads
    permutations = orders(plan, config.num_key_value_heads)
    _permute(model, permutations, head_dim, group)
    model.set_attn_implementation(NAME)
    backends = [SDPBackend.FLASH_ATTENTION] if model.device.type == "cuda" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    try:
        with sdpa_kernel(backends):
            yield model
    finally:
        model.set_attn_implementation(previous)
        _permute(model, [sorted(range(len(order)), key=order.__getitem__) for order in permutations], head_dim, group)


@torch.no_grad()
def _permute(model: nn.Module, permutations: list[list[int]], head_dim: int, group: int) -> None:
    for layer, order in zip(model.model.layers, permutations, strict=True):
        attention = layer.self_attn

        def rows(heads, device=attention.q_proj.weight.device):
            return torch.tensor([head * head_dim + i for head in heads for i in range(head_dim)], device=device)

        kv, q = rows(order), rows([head * group + i for head in order for i in range(group)])
        for projection, index in ((attention.q_proj, q), (attention.k_proj, kv), (attention.v_proj, kv)):
            projection.weight.copy_(projection.weight[index])
            if projection.bias is not None:
                projection.bias.copy_(projection.bias[index])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, q])


def fake_duo(model: nn.Module, plan: zz.Plan, context: int, room: int) -> Cache:
    """The cache of a model under `duo_weights`, of random contents, with room for `room` more tokens."""
    layers, like = [], model.lm_head.weight
    for layer, kinds in zip(model.model.layers, plan.retrieval_heads(model.config.num_key_value_heads), strict=True):
        sizes = (sum(kinds), len(kinds) - sum(kinds), layer.self_attn.head_dim, context, room, plan.sink, plan.window)
        layers.append(DuoLayer(*sizes, like))
        layer.self_attn.duo_layer = layers[-1]
    return Cache(layers=layers)
