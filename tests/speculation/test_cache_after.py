"""A cache that drafted and took back is, where anything can be seen, one that never drafted."""

import pytest
import torch
from tiny_models import padded_prompt, prompt, tiny_model

import zigzag_ext as zz
from zigzag_ext.attention import ops
from zigzag_ext.hf.cache_argument import cache_argument
from zigzag_ext.hf.session import session_of
from zigzag_ext.speculation.chain import StreamingDraft

SINK, WINDOW, SLACK = 4, 16, 7
KINDS = ["streaming", "retrieval"] * 2
FORMATS = ["none", "fp8", "int8", "int4"]


def shown(store, lengths):
    """Per row the bytes of keys and values (and scales) that later queries can see, by position."""
    rows = []
    for row, length in enumerate(lengths.tolist()):
        positions = torch.arange(length)
        if store.window:
            positions = positions[(positions < store.sink) | (positions > length - store.window)]
            slots = torch.where(
                positions < store.sink, positions, store.sink + (positions - store.sink) % (store.capacity - store.sink)
            )
        else:
            slots = positions
        rows.append([buffer[row, :, : store.capacity][:, slots].clone() for buffer in store.buffers.values()])
    return rows


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("window", [0, WINDOW])
def test_bits_after_a_draft_in_place_a_verification_and_a_cut(kv_format, window):
    """At op level, with the same keys and values: bit for bit. The draft reads a full buffer through a window."""
    generator = torch.Generator().manual_seed(1)
    slots = SINK + WINDOW + SLACK if window else 128
    shape = (2, 2, slots, 64)
    caches = [ops.new_cache(*shape, torch.float32, torch.device("cpu"), kv_format) for _ in range(4)]
    keys, values, other_keys, other_values = caches[0], caches[1], caches[2], caches[3]
    lengths = torch.tensor([40, 29], dtype=torch.int32)
    rings = {"sink": SINK, "window": window} if window else {}

    def new(n, scale=1.0):
        return (torch.randn(2, 2, n, 64, generator=generator) * scale for _ in range(2))

    k, v = new(40)
    for cache in ((keys, values), (other_keys, other_values)):
        pad = torch.tensor([0, 11], dtype=torch.int32)
        scales = {"k_scale": cache[0][1], "v_scale": cache[1][1]}
        ops.append(k, v, cache[0][0], cache[1][0], torch.zeros(2, dtype=torch.int32), pad=pad, **rings, **scales)
    scales = {"k_scale": keys[1], "v_scale": values[1]}
    ahead = lengths.clone()
    through = rings or {"sink": SINK, "window": 8}
    for _ in range(SLACK):  # the draft, in place
        k, v = new(1, 3.0)
        ops.attention(torch.randn(2, 4, 1, 64, generator=generator), k, v, keys[0], values[0], ahead, **through, **scales)
        ahead += 1
    k, v = new(SLACK + 1)
    query = torch.randn(2, 4, SLACK + 1, 64, generator=generator)
    counts = torch.tensor([SLACK + 1, 4])
    verified = ops.attention(query, k, v, keys[0], values[0], lengths, pad=(SLACK + 1 - counts).int(), **rings, **scales)[0]
    kept = [3, 2]
    for row, n in enumerate(kept):  # the cache that never drafted takes the tokens that were kept, one by one
        for token in range(n):
            column = SLACK + 1 - int(counts[row]) + token
            args = (t[row : row + 1, :, column : column + 1] for t in (query, k, v))
            own = {name: None if t[1] is None else t[1][row : row + 1] for name, t in
                   (("k_scale", other_keys), ("v_scale", other_values))}  # fmt: skip
            out = ops.attention(
                *args,
                other_keys[0][row : row + 1],
                other_values[0][row : row + 1],
                lengths[row : row + 1] + token,
                **rings,
                **own,
            )[0]
            torch.testing.assert_close(out[0, :, 0], verified[row, :, column], atol=1e-5, rtol=1e-4)
    for row, n in enumerate(kept):
        end = int(lengths[row]) + n
        positions = torch.arange(end)
        seen = positions[(positions < SINK) | (positions > end - WINDOW)] if window else positions
        ring = SINK + (seen - SINK) % (slots - SINK)
        slot = torch.where(seen < SINK, seen, ring) if window else seen
        for found, expected in ((keys, other_keys), (values, other_values)):
            for a, b in zip(found, expected, strict=True):
                assert a is b is None or a[row][:, slot].view(torch.uint8).equal(b[row][:, slot].view(torch.uint8))


@pytest.mark.parametrize("draft", ["lookup", "streaming"])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_buffers_after_generate(kv_format, draft, force_drafts):
    """Through a model, 1e-5, or one code where the rounding of a forward of several tokens falls over an edge."""
    plan = zz.Plan(KINDS, sink=SINK, window=WINDOW, kv_format=kv_format, ring_kv_format=kv_format)
    given, options = padded_prompt([9, 25, 14]), {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with zz.zigzag(tiny_model(), plan) as model, torch.no_grad():
        plain, own = (zz.ZigzagCache(model.config, plan, rollback=SLACK) for _ in range(2))
        expected = model.generate(**given, **options, max_new_tokens=30, **cache_argument(model, plain))
        if draft == "lookup":
            force_drafts(expected[:, 25:], right=3)
        speculation = zz.speculate(draft=draft, window=8)
        found = model.generate(**given, **options, max_new_tokens=30, custom_generate=speculation, **cache_argument(model, own))
        assert found.equal(expected) and own.seq_lens.equal(plain.seq_lens)
        for ours, theirs in zip(own.stores, plain.stores, strict=True):
            for a, b in zip(shown(ours, own.seq_lens), shown(theirs, plain.seq_lens), strict=True):
                for x, y in zip(a, b, strict=True):
                    if x.dtype == torch.float32:
                        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
                    else:
                        assert (x.view(torch.uint8) != y.view(torch.uint8)).float().mean() < 0.01


def test_a_draft_that_is_interrupted_leaves_the_cache_as_it_was(monkeypatch):
    """Ctrl-C between two steps of the chain: nothing but the slots behind every row's end has changed."""
    plan = zz.Plan(KINDS, sink=SINK, window=WINDOW)
    with zz.zigzag(tiny_model(), plan) as model, torch.no_grad():
        caches = [zz.ZigzagCache(model.config, plan, rollback=SLACK) for _ in range(2)]
        for cache in caches:
            model(prompt(50), past_key_values=cache)
        chain, steps = StreamingDraft(session_of(model), caches[0], 8), iter(range(3))

        def choose(logits, drafts, step):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return logits.argmax(-1), None

        with pytest.raises(KeyboardInterrupt):
            chain(prompt(1)[:, 0], [SLACK], torch.zeros(1, dtype=torch.long), choose)
        assert caches[0].state.rows.ahead.tolist() == [SLACK]
        found, expected = (model(prompt(1, seed=4), past_key_values=cache).logits for cache in caches)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(RuntimeError, match="8 tokens of a draft would overwrite"):
            caches[0].write_ahead([SLACK + 1])
