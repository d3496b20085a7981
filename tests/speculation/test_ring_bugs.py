"""Faults that other projects' ring caches had with tokens taken back, one test each.

mlx-swift-lm#424: once the ring has wrapped, taking back does nothing. mlx-lm#1914: appending several tokens evicts too few.
mlx-vlm#1715: cutting a ring by its logical length scrambles it. Rapid-MLX#3605: a request dies when it crosses the window.
mlx-lm#1423: what was evicted for a rejected token is gone. transformers PR#48280: taking back none is taken for all.
"""

import pytest
import torch
from tiny_models import padded_prompt, prompt, tiny_model

import zigzag_ext as zz
from zigzag_ext.hf.session import session_of

SINK, WINDOW, DRAFT = 4, 16, 7
PLAN = zz.Plan(["streaming"] * 4, sink=SINK, window=WINDOW)


@pytest.fixture(scope="module")
def model():
    with zz.zigzag(tiny_model(), PLAN) as model, torch.no_grad():
        yield model


def cache_of(model, ids, pieces=(), **options):
    """A cache that read `ids` in forwards of these lengths, then of the rest."""
    cache = zz.ZigzagCache(model.config, PLAN, rollback=DRAFT, **options)
    for piece in torch.split(ids, [*pieces, ids.shape[1] - sum(pieces)], dim=1):
        model(piece, past_key_values=cache)
    return cache


def verify(model, cache, ids):
    """Logits of the columns of `ids` [1, n], by the forward that verifies drafts."""
    positions = cache.seq_lens[:, None] + torch.arange(ids.shape[1])
    return session_of(model).step(cache, [ids.shape[1]], input_ids=ids, position_ids=positions).logits


def assert_same(model, cache, expected_text):
    """The cache answers as one that has only read the text."""
    step = prompt(1, seed=9)
    fresh = cache_of(model, expected_text)
    assert cache.seq_lens.equal(fresh.seq_lens)
    found, expected = (model(step, past_key_values=each).logits for each in (cache, fresh))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


LENGTHS = [2, SINK, SINK + WINDOW - DRAFT, SINK + WINDOW - 1, SINK + WINDOW, SINK + WINDOW + 1, SINK + 2 * WINDOW + 3, 100]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kept", [0, 1, 4, 7, 8])
def test_rejected_tokens_are_gone_after_the_ring_has_wrapped(model, length, kept):
    text, draft = prompt(length), prompt(DRAFT + 1, seed=2)
    cache = cache_of(model, text)
    verify(model, cache, draft)
    taken = DRAFT + 1 - kept
    if taken > DRAFT and length + taken > SINK + WINDOW + DRAFT:
        with pytest.raises(RuntimeError, match="rollback=7"):
            cache.crop([-taken])
        return
    cache.crop([-taken])
    assert_same(model, cache, torch.cat([text, draft[:, :kept]], 1))


@pytest.mark.parametrize("length", LENGTHS)
def test_several_tokens_evict_as_many(model, length):
    text, more = prompt(length), prompt(8, seed=3)
    cache = cache_of(model, text)
    verify(model, cache, more)
    assert_same(model, cache, torch.cat([text, more], 1))


@pytest.mark.parametrize("length", LENGTHS)
def test_many_cuts_in_a_row_leave_the_order_as_it_was(model, length):
    text = prompt(length)
    cache = cache_of(model, text)
    for turn in range(25):
        draft = prompt(1 + turn % (DRAFT + 1), seed=turn)
        verify(model, cache, draft)
        kept = 1 + (turn * 5) % draft.shape[1]
        cache.crop([kept - draft.shape[1]])
        text = torch.cat([text, draft[:, :kept]], 1)
    assert_same(model, cache, text)


@pytest.mark.parametrize("start", range(SINK + WINDOW - DRAFT - 2, SINK + WINDOW + 3))
def test_a_draft_across_the_edge_of_the_window(model, start):
    """Drafts that begin before the ring is full and end after it, at every place."""
    text, draft = prompt(start), prompt(DRAFT + 1, seed=4)
    cache = cache_of(model, text)
    found = verify(model, cache, draft)
    own = cache_of(model, text)
    expected = torch.cat([model(token, past_key_values=own).logits for token in draft.split(1, 1)], 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    cache.crop([-DRAFT])
    assert_same(model, cache, torch.cat([text, draft[:, :1]], 1))


def test_what_a_rejected_token_has_evicted_is_still_there(model):
    """The oldest token of the window after the cut is the one that the draft's last token came to replace."""
    text = prompt(SINK + WINDOW + DRAFT)
    cache = cache_of(model, text)
    before = model(prompt(1, seed=9), past_key_values=cache_of(model, text)).logits
    verify(model, cache, prompt(DRAFT, seed=5))
    cache.crop([-DRAFT])
    torch.testing.assert_close(model(prompt(1, seed=9), past_key_values=cache).logits, before, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("nothing", [0, [0]])
def test_taking_back_none_takes_back_none(model, nothing):
    text = prompt(50)
    cache = cache_of(model, text)
    cache.crop(nothing)
    assert_same(model, cache, text)


def test_positions_go_on_behind_what_was_kept(model):
    """Keys are cached at absolute positions: after a cut the next token has the position of the first one that was rejected."""
    batch, cache = padded_prompt([9, 25]), zz.ZigzagCache(model.config, PLAN, rollback=DRAFT)
    model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    draft = prompt(5, 2, seed=6)
    positions = cache.seq_lens[:, None] + torch.arange(5)
    session_of(model).step(cache, [5, 5], input_ids=draft, position_ids=positions)
    cache.crop([-4, -1])
    assert cache.seq_lens.tolist() == [10, 29]
    step = prompt(1, 2, seed=7)
    found = session_of(model).step(cache, [1, 1], input_ids=step, position_ids=cache.seq_lens[:, None].long()).logits
    for row, (length, kept) in enumerate([(9, 1), (25, 4)]):
        text = torch.cat([batch["input_ids"][row : row + 1, -length:], draft[row : row + 1, :kept]], 1)
        expected = model(step[row : row + 1], past_key_values=cache_of(model, text)).logits
        torch.testing.assert_close(found[row], expected[0], atol=1e-4, rtol=1e-5)
