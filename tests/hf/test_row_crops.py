"""Rows that take back numbers of their own: `crop` with one per row, forwards with counts."""

import numpy as np
import pytest
import torch
from tiny_models import new_model, padded_prompt, prompt

import zigzag_ext as zz
from zigzag_ext.hf.session import session_of

SINK, WINDOW, SLACK = 4, 16, 7
PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=SINK, window=WINDOW)
HEADS = zz.Plan([("retrieval", "streaming"), "streaming", "retrieval", "streaming"], sink=SINK, window=WINDOW)
LENGTHS = [3, 30, 19]


@pytest.fixture(scope="module")
def model():
    with zz.zigzag(new_model("llama"), PLAN) as model, torch.no_grad():
        yield model


def step(model, cache, ids, counts):
    """ids [batch, q_len]; logits of all columns. Positions follow each row's last token."""
    q_len = ids.shape[1]
    behind = torch.arange(q_len) - (q_len - torch.tensor(counts)[:, None])
    positions = cache.seq_lens[:, None] + behind.clamp(min=0)
    return session_of(model).step(cache, counts, input_ids=ids, position_ids=positions).logits


def after_prompts(model, plan, **options):
    """A cache of three padded rows, and one cache for each row alone."""
    batch = padded_prompt(LENGTHS)
    cache = zz.ZigzagCache(model.config, plan, rollback=SLACK, **options)
    model(**batch, position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp(min=0), past_key_values=cache)
    alone = [zz.ZigzagCache(model.config, plan, rollback=SLACK) for _ in LENGTHS]
    for row, length in enumerate(LENGTHS):
        model(batch["input_ids"][row : row + 1, -length:], past_key_values=alone[row])
    return cache, alone


@pytest.mark.parametrize("plan", [PLAN, HEADS], ids=["plain", "heads"])
def test_each_row_is_what_it_would_be_alone(model, plan):
    cache, alone = after_prompts(model, plan)
    rng = np.random.default_rng(0)
    for turn in range(15):
        counts = rng.integers(0, SLACK + 2, 3).tolist()
        counts[2] = 0 if turn > 8 else counts[2]  # a row that is finished
        kept = [int(rng.integers(0, n + 1)) for n in counts]
        q_len = max(*counts, 1)
        ids = prompt(q_len, 3, seed=turn)
        found = step(model, cache, ids, counts)
        cache.crop([kept_row - n for kept_row, n in zip(kept, counts, strict=True)])
        for row, own in enumerate(alone):
            if counts[row]:
                expected = step(model, own, ids[row : row + 1, q_len - counts[row] :], [counts[row]])
                torch.testing.assert_close(found[row, q_len - counts[row] :], expected[0], atol=1e-4, rtol=1e-5)
                own.crop(kept[row] - counts[row])
        assert cache.seq_lens.tolist() == [int(own.seq_lens) for own in alone] == cache.state.rows.held.tolist()
        for row, own in enumerate(alone):
            noted = cache.state.tokens.ids[row, : cache.state.columns]
            assert noted[noted >= 0].equal(own.state.tokens.ids[0, : own.state.columns])
    assert cache.get_seq_length() == int(cache.state.rows.ends.max())


def test_a_mask_goes_on_after_rows_took_back(model):
    """Columns that a row took back while another kept them are zeros of the next mask; others are refused."""
    cache, alone = after_prompts(model, PLAN)
    ids = prompt(5, 3)
    step(model, cache, ids, [5] * 3)
    cache.crop([-3, 0, -1])
    for own, row, kept in zip(alone, range(3), (2, 5, 4), strict=True):
        step(model, own, ids[row : row + 1, :kept], [kept])
    mask = torch.cat([padded_prompt(LENGTHS)["attention_mask"], torch.ones(3, 25, dtype=torch.long)], 1)
    question = prompt(20, 3, seed=5)
    before = cache.seq_lens.clone()
    with pytest.raises(ValueError, match="masks other tokens"):
        model(question, attention_mask=mask, past_key_values=cache)
    assert cache.seq_lens.equal(before)
    mask[0, 32:35] = mask[2, 34:35] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -20:]
    found = model(question, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
    for row, own in enumerate(alone):
        expected = model(question[row : row + 1], past_key_values=own).logits
        torch.testing.assert_close(found[row], expected[0], atol=1e-4, rtol=1e-5)


def test_a_row_takes_back_no_more_than_its_ring_can(model):
    cache, _ = after_prompts(model, PLAN)
    step(model, cache, prompt(8, 3), [8] * 3)
    before = cache.seq_lens.clone()
    with pytest.raises(RuntimeError, match=r"8 tokens back; the rings of layers \[0, 2\] can take back 7"):
        cache.crop([0, -8, 0])
    with pytest.raises(RuntimeError, match="more than the 38 tokens"):
        cache.crop([0, -39, 0])
    with pytest.raises(ValueError, match="one per row of 3"):
        cache.crop([-1, -1])
    assert cache.seq_lens.equal(before)
    cache.crop([-8, -7, -7])  # the first row's ring has never been full
    assert cache.seq_lens.tolist() == LENGTHS[:1] + [31, 20]


def test_only_the_tokens_of_a_row_need_room(model):
    """max_len counts what each row gets, not the columns of the longest draft."""
    cache, _ = after_prompts(model, PLAN, max_len=32)
    step(model, cache, prompt(6, 3), [6, 2, 0])
    with pytest.raises(RuntimeError, match="the cache is full: max_len is 32"):
        step(model, cache, prompt(6, 3), [6, 1, 0])
    step(model, cache, prompt(6, 3), [6, 0, 0])
    assert cache.seq_lens.tolist() == [15, 32, 19]


@pytest.mark.parametrize(
    "counts,q_len,message",
    [([1, 2], 3, r"\[3\] numbers of 0 to 3"), ([1, 4, 0], 3, "0 to 3"), ([1, -1, 0], 3, "0 to 3"), ([1, 1, 1], 17, "up to 16")],
)
def test_counts_are_checked(model, counts, q_len, message):
    cache, _ = after_prompts(model, PLAN)
    with pytest.raises(ValueError, match=message), cache.forward(3, q_len, counts=counts):
        pass
    with pytest.raises(ValueError, match="not both"), cache.forward(3, 2, torch.ones(3, 32), counts=[1, 1, 1]):
        pass
    assert cache.seq_lens.tolist() == LENGTHS


def test_a_failed_forward_with_counts_leaves_no_trace(model, monkeypatch):
    cache, _ = after_prompts(model, PLAN)
    step(model, cache, prompt(4, 3), [4, 1, 2])
    before, noted = cache.seq_lens.clone(), cache.state.tokens.ids[:, : cache.state.columns].clone()
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(type(model.lm_head), "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        step(model, cache, prompt(4, 3, seed=2), [4, 4, 4])
    assert cache.seq_lens.equal(before) and cache.state.tokens.ids[:, : cache.state.columns].equal(noted)
