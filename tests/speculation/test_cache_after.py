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


class Caches:
    """Keys and values of two rows, padded on the left, in one format, for the ops."""

    def __init__(self, kv_format, slots, rings):
        shape = (2, 2, slots, 64, torch.float32, torch.device("cpu"), kv_format)
        self.keys, self.values, self.rings = ops.new_cache(*shape), ops.new_cache(*shape), rings

    def options(self, row=slice(None)) -> dict:
        scales = {"k_scale": self.keys[1], "v_scale": self.values[1]}
        return {name: scale if scale is None else scale[row] for name, scale in scales.items()}

    def append(self, k, v, pad):
        lengths = torch.zeros(2, dtype=torch.int32)
        ops.append(k, v, self.keys[0], self.values[0], lengths, pad=pad, **self.rings, **self.options())

    def attend(self, q, k, v, lengths, row=slice(None), rings=None, pad=None):
        caches = self.keys[0][row], self.values[0][row]
        return ops.attention(q, k, v, *caches, lengths, pad=pad, **(rings or self.rings), **self.options(row))[0]

    def shown(self, row, end) -> list[torch.Tensor]:
        """Bytes that a query behind `end` tokens can see."""
        slots = positions = torch.arange(end)
        if self.rings:
            positions = positions[(positions < SINK) | (positions > end - WINDOW)]
            ring = SINK + (positions - SINK) % (self.keys[0].shape[2] - SINK)
            slots = torch.where(positions < SINK, positions, ring)
        return [t[row][:, slots].view(torch.uint8) for pair in (self.keys, self.values) for t in pair if t is not None]


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("window", [0, WINDOW])
def test_bits_after_a_draft_in_place_a_verification_and_a_cut(kv_format, window):
    """At op level, with the same keys and values: bit for bit. The draft reads a full buffer through a window."""
    generator = torch.Generator().manual_seed(1)
    slots, rings = (SINK + WINDOW + SLACK, {"sink": SINK, "window": WINDOW}) if window else (128, {})
    drafted, plain = Caches(kv_format, slots, rings), Caches(kv_format, slots, rings)
    lengths, counts, kept = torch.tensor([40, 29], dtype=torch.int32), torch.tensor([SLACK + 1, 4]), [3, 2]

    def new(n):
        return [torch.randn(2, heads, n, 64, generator=generator) for heads in (4, 2, 2)]

    _, k, v = new(40)
    for cache in (drafted, plain):
        cache.append(k, v, 40 - lengths)
    for step in range(SLACK):
        drafted.attend(*new(1), lengths + step, rings=rings or {"sink": SINK, "window": 8})
    q, k, v = new(SLACK + 1)
    verified = drafted.attend(q, k, v, lengths, pad=(SLACK + 1 - counts).int())
    for row, n in enumerate(kept):  # the cache that never drafted takes the tokens that were kept, one by one
        row_of = slice(row, row + 1)
        for token in range(n):
            column = SLACK + 1 - int(counts[row]) + token
            one = [t[row_of, :, column : column + 1] for t in (q, k, v)]
            out = plain.attend(*one, lengths[row_of] + token, row=row_of)
            torch.testing.assert_close(out[0, :, 0], verified[row, :, column], atol=1e-5, rtol=1e-4)
        end = int(lengths[row]) + n
        assert all(a.equal(b) for a, b in zip(drafted.shown(row, end), plain.shown(row, end), strict=True))


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
