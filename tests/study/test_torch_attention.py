"""Attention in torch: equal to the specification, and differentiable; a probed model refuses what it would ignore."""

import pytest
import torch

import zigzag_ext as zz
from zigzag_ext.attention import reference
from zigzag_ext.study.evaluate.scoring import attention_of
from zigzag_ext.study.probe import probe
from zigzag_ext.study.torch_attention import banded, causal

from .conftest import KV_HEADS, LAYERS


def inputs(n, heads=6, kv_heads=3, batch=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, n, dim), (batch, kv_heads, n, dim), (batch, kv_heads, n, dim)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def expected(query, key, value, scale, kinds, sink, window):
    """The specification, KV head by KV head."""
    group = query.shape[1] // key.shape[1]
    out = []
    for head, retrieves in enumerate(kinds):
        q, k, v = query[:, head * group : (head + 1) * group], key[:, head : head + 1], value[:, head : head + 1]
        empty = torch.empty(len(q), 1, 0, q.shape[-1], dtype=q.dtype)
        lengths = torch.zeros(len(q), dtype=torch.int32)
        ring = {} if retrieves else {"sink": sink, "window": window}
        out.append(reference.attention(q, k, v, empty, empty.clone(), lengths, **ring, scale=scale)[0])
    return torch.cat(out, 1)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 128, 129, 200, 400])
@pytest.mark.parametrize("sink,window", [(0, 1), (0, 70), (5, 3), (4, 64), (100, 100)])
def test_banded_is_the_specification(n, sink, window):
    q, k, v = inputs(n)
    torch.testing.assert_close(banded(q, k, v, 0.3, sink, window), expected(q, k, v, 0.3, [False] * 3, sink, window))


def test_banded_has_the_gradient_of_masked_attention():
    q, k, v = (x.requires_grad_() for x in inputs(130, batch=1))
    weight = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((banded(q, k, v, 0.3, 3, 9) * weight).sum(), (q, k, v))
    position = torch.arange(130)
    mask = reference.visible(position[None], position[:, None], 3, 9)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    for a, b in zip(ours, torch.autograd.grad((dense * weight).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


def attend(layer, query, key, value, scale):
    """Layer 0 streams, the first head of layer 1 as well."""
    if layer == 0:
        return banded(query, key, value, scale, 4, 32)
    out = causal(query, key, value, scale)
    if layer == 1:
        group = query.shape[1] // key.shape[1]
        out[:, :group] = banded(query[:, :group], key[:, :1], value[:, :1], scale, 4, 32)
    return out


def test_a_probed_model_is_the_plan_on_the_kernels(model):
    ids = torch.randint(0, 100, (2, 300), generator=torch.Generator().manual_seed(3))
    plan = zz.Plan.from_heads([[False] * KV_HEADS, [False] + [True] * (KV_HEADS - 1), [True] * KV_HEADS], sink=4, window=32)
    logits = []
    with torch.no_grad():
        for way in (attention_of(model, plan), probe(model, attend), attention_of(model, None)):
            with way:
                logits.append(model(ids, use_cache=False).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 0.1


@torch.no_grad()
def test_a_probed_model_refuses_what_it_would_ignore(model):
    ids = torch.ones(1, 5, dtype=torch.long)
    before = model.config._attn_implementation
    with probe(model, attend):
        with pytest.raises(ValueError, match="attention_mask"):
            model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
        with pytest.raises(ValueError, match="use_cache"):
            model(ids)
        with pytest.raises(RuntimeError, match="disable"), probe(model, attend):
            pass
    assert model.config._attn_implementation == before
    with zz.zigzag(model, zz.Plan(["retrieval"] * LAYERS, sink=0, window=1)):  # the interface is free again
        model(ids)
    for kinds, message in (
        ([["retrieval", "streaming"]] * 2, "2 layers"),
        ([["retrieval", *["streaming"] * 2]] * LAYERS, "3 KV"),
    ):
        with pytest.raises(ValueError, match=message), attention_of(model, zz.Plan(kinds, sink=1, window=1)):
            pass
    with pytest.raises(TypeError, match="a Plan or None"), attention_of(model, "0101"):
        pass


def test_causal_takes_grouped_heads():
    q, k, v = inputs(20)
    torch.testing.assert_close(causal(q, k, v, 0.5), expected(q, k, v, 0.5, [True] * 3, 0, 1))
