"""Key smoothing: keys are cached less a constant per row and head, set by a row's first tokens, and attention is what it was."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny_models import generate, new_model, padded_prompt, prompt, tiny_model
from transformers import LlamaConfig

import zigzag_ext as zz
from zigzag_ext.attention import ops, reference, smoothing

SINK, WINDOW = 4, 16
KINDS = ["streaming", "retrieval", "retrieval", "streaming"]
PLAN = zz.Plan(KINDS, sink=SINK, window=WINDOW, kv_format="int4", ring_kv_format="int8", key_smoothing=True)
CONFIG = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=256)
SMALL = zz.Plan(["retrieval", "streaming"], sink=SINK, window=WINDOW, kv_format="int4", ring_kv_format="int4", key_smoothing=True)


def draw(batch, q_len, seed=0):
    """q, k and v whose keys have a large constant in some channels, another one in each row and head."""
    rng = torch.Generator().manual_seed(seed)
    constant = torch.randn(batch, 2, 1, 64, generator=torch.Generator().manual_seed(99)).pow(3) * 3
    q, k, v = (torch.randn(batch, heads, q_len, 64, generator=rng) for heads in (4, 2, 2))
    return q, k + constant, v


def feed(cache, chunk, mask=None):
    """One forward; outputs per layer."""
    batch, _, q_len, _ = chunk[0].shape
    with cache.forward(batch, q_len, mask):
        return [layer.attend(*chunk, 0.125) for layer in cache.layers]


def mean_of_first(k, pad):
    """[batch, heads, 1, head_dim], in the plainest way."""
    return torch.stack([k[b, :, first : first + smoothing.TOKENS].mean(1, keepdim=True) for b, first in enumerate(pad)])


def specified(cache, k, pad, layer):
    """Codes and scales of `k` less the means, of the slots of one layer."""
    codes, scales = ops.new_cache(len(pad), 2, layer.slots, 64, k.dtype, "cpu", "int4")
    v_codes, v_scales = codes.clone(), scales.clone()
    lengths, skipped = torch.zeros(len(pad), dtype=torch.int32), torch.tensor(pad, dtype=torch.int32)
    options = {"pad": skipped, "sink": layer.sink, "window": layer.window, "k_scale": scales, "v_scale": v_scales}
    reference.append(k - mean_of_first(k, pad), k, codes, v_codes, lengths, **options)
    return codes, scales


@pytest.mark.parametrize("pad", [(0, 0, 0), (3, 0, 150)])
def test_what_is_cached_and_what_is_attended(pad):
    """Up to the rounding of a mean the codes are those of k - mean, and outputs those of attention over what they stand for."""
    cache, (q, k, v) = zz.ZigzagCache(CONFIG, SMALL, max_len=400), draw(3, 200)
    mask = (torch.arange(200) >= torch.tensor(pad)[:, None]).long()
    outs = feed(cache, (q, k, v), mask)
    for layer, out in zip(cache.layers, outs, strict=True):
        codes, scales = specified(cache, k, pad, layer)
        for row, first in enumerate(pad):
            used = reference.position_of(layer.slots, 200 - first, layer.sink, layer.window) >= 0
            got = reference.decode(
                layer.keys[row][:, used], layer.stores[0].buffers["key_scales"][row][:, : layer.slots][:, used]
            )
            want = reference.decode(codes[row][:, used], scales[row][:, used])
            off = (got - want).abs() > 1e-4 * scales[row][:, used][..., None]
            assert off.double().mean() < 1e-3
        torch.testing.assert_close(layer.stores[0].key_offset, mean_of_first(k, pad), rtol=1e-5, atol=1e-5)
        lengths, skipped = torch.zeros(3, dtype=torch.int32), torch.tensor(pad, dtype=torch.int32)
        empty = [t for _ in "kv" for t in ops.new_cache(3, 2, layer.slots, 64, k.dtype, "cpu", "int4")]
        options = {"pad": skipped, "sink": layer.sink, "window": layer.window, "k_scale": empty[1], "v_scale": empty[3]}
        smoothed = k - layer.stores[0].key_offset
        want, _ = reference.attention(q, smoothed, v, empty[0], empty[2], lengths, **options, scale=0.125)
        torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)


def test_codes_get_finer():
    """With constant channels the error of int4 attention shrinks several times, and without smoothing nothing is subtracted."""
    chunk, error = draw(1, 300), {}
    exact = zz.ZigzagCache(CONFIG, zz.Plan(SMALL.kinds, sink=SINK, window=WINDOW), max_len=400)
    want = feed(exact, chunk)
    for smooth in (False, True):
        plan = replace(SMALL, kv_format="int4/none", ring_kv_format="int4/none", key_smoothing=smooth)
        cache = zz.ZigzagCache(CONFIG, plan, max_len=400)
        error[smooth] = [float((a - b).norm() / b.norm()) for a, b in zip(feed(cache, chunk), want, strict=True)]
        assert all((layer.stores[0].key_offset is None) != smooth for layer in cache.layers)
    assert all(smoothed < plain / 3 for smoothed, plain in zip(error[True], error[False], strict=True)), error


def test_chunks_move_no_bit():
    """Cutting behind the first `TOKENS` tokens, of rows with and without padding."""
    chunk, pad = draw(2, 300), (0, 40)
    mask = (torch.arange(300) >= torch.tensor(pad)[:, None]).long()
    held = []
    for cuts in ([300], [168, 17, 15, 1, 99]):
        cache, done = zz.ZigzagCache(CONFIG, SMALL, max_len=400), 0
        for step in cuts:
            feed(cache, [t[:, :, done : done + step] for t in chunk], mask[:, : done + step])
            done += step
        held.append([(layer.keys.clone(), layer.stores[0].key_offset.clone()) for layer in cache.layers])
    for (keys, offset), (other_keys, other_offset) in zip(*held, strict=True):
        assert offset.equal(other_offset)
        for row, first in enumerate(pad):
            slots = 300 - first if keys.shape[2] > 100 else SINK + WINDOW
            assert keys[row, :, :slots].equal(other_keys[row, :, :slots])


def test_an_offset_stays_and_goes_with_its_row():
    cache = zz.ZigzagCache(CONFIG, SMALL, max_len=400)
    feed(cache, draw(2, 40))
    first, address = (
        [layer.stores[0].key_offset.clone() for layer in cache.layers],
        [layer.stores[0].key_offset.data_ptr() for layer in cache.layers],
    )
    feed(cache, draw(2, 1, seed=1))
    feed(cache, draw(2, 40, seed=2))
    assert all(layer.stores[0].key_offset.equal(offset) for layer, offset in zip(cache.layers, first, strict=True))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert all(layer.stores[0].key_offset.equal(offset.flip(0)) for layer, offset in zip(cache.layers, first, strict=True))
    assert address == [layer.stores[0].key_offset.data_ptr() for layer in cache.layers]
    other = copy.deepcopy(cache)
    cache.batch_select_indices(torch.tensor([1]))
    assert all(layer.stores[0].key_offset.equal(offset[:1]) for layer, offset in zip(cache.layers, first, strict=True))
    other.reset()
    assert not any(layer.stores[0].key_offset.any() for layer in other.layers)
    feed(other, draw(2, 40))
    assert all(layer.stores[0].key_offset.equal(offset) for layer, offset in zip(other.layers, first, strict=True))


def test_a_forward_that_is_refused_leaves_the_cache_usable():
    """Autograd is refused by the op, after the offsets are set."""
    cache, (q, k, v) = zz.ZigzagCache(CONFIG, SMALL, max_len=400), draw(1, 40)
    with pytest.raises(RuntimeError, match="no backward pass"), cache.forward(1, 40):
        cache.layers[0].attend(q, k.clone().requires_grad_(), v, 0.125)
    fresh = zz.ZigzagCache(CONFIG, SMALL, max_len=400)
    for out, expected in zip(feed(cache, (q, k, v)), feed(fresh, (q, k, v)), strict=True):
        assert out.equal(expected)


def test_rows_that_start_with_few_tokens_are_not_smoothed():
    """Nor are keys that stay in the model's dtype."""
    cache = zz.ZigzagCache(CONFIG, SMALL, max_len=400)
    feed(cache, draw(1, ops.MAX_DECODE_QUERIES))
    assert not any(layer.stores[0].key_offset.any() for layer in cache.layers)
    cache = zz.ZigzagCache(CONFIG, replace(SMALL, ring_kv_format="none/int8"), max_len=400)
    feed(cache, draw(1, 40))
    assert [layer.stores[0].key_offset is None for layer in cache.layers] == [False, True]


def test_generation(monkeypatch):
    """Greedy, beams, padding and several turns: the tokens of the specification."""
    batch = padded_prompt([40, 22])
    with zz.zigzag(tiny_model(), PLAN, max_len=96) as model:  # the specification looks at every slot
        tokens, beams = generate(model, 12, **batch), generate(model, 8, **batch, num_beams=2)
        alone = generate(model, 12, batch["input_ids"][1:, -22:])
        assert alone.equal(tokens[1:])
        monkeypatch.setattr(ops, "attention", reference.attention)
        assert tokens.equal(generate(model, 12, **batch))
        assert beams.equal(generate(model, 8, **batch, num_beams=2))


def test_compiled_steps_give_the_tokens_of_eager_ones():
    batch = padded_prompt([40, 23])
    with zz.zigzag(tiny_model(), PLAN, max_len=128) as model:
        eager = generate(model, 30, **batch)
    with zz.zigzag(new_model("llama"), PLAN, max_len=128, compile=True) as model:
        assert generate(model, 30, **batch).equal(eager)
        with torch.compiler.set_stance("fail_on_recompile"):
            other = generate(model, 5, **padded_prompt([40, 23], seed=3))
            assert generate(model, 30, **batch).equal(eager)  # offsets of the prompt between are gone
        assert not other.equal(eager[:, :5])


@pytest.mark.parametrize("duo", [False, True])
def test_layers_of_both_kinds_of_heads_and_duo_attention(duo):
    """Eight bits change logits by little, whatever is subtracted: head numbers, partial results and rings must agree on it."""
    kinds, ids, logits = ["streaming", ("retrieval", "streaming"), ("streaming", "retrieval"), "retrieval"], prompt(150), {}
    int8 = {"kv_format": "int8", "ring_kv_format": "int8"}
    for name, options in {"exact": {}, "plain": int8, "smooth": int8 | {"key_smoothing": True}}.items():
        plan = zz.Plan(kinds, sink=SINK, window=WINDOW, **options)
        with torch.inference_mode(), zz.zigzag(tiny_model(), plan) as model, zz.prefill_options(duo_attention=duo):
            cache = zz.ZigzagCache(model.config, plan)
            pieces = [model(piece, past_key_values=cache).logits for piece in ids.split(60, 1)]
            logits[name] = torch.cat(pieces, 1).double()
    exact = logits.pop("exact")
    error = {name: float((found - exact).norm() / exact.norm()) for name, found in logits.items()}
    assert 0 < error["plain"] < 0.06 and 0 < error["smooth"] < 1.3 * error["plain"], error
    assert not logits["plain"].equal(logits["smooth"])
