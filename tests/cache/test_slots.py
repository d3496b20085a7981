"""Slots: forwards over some rows of a cache, which grow, fail and go without the others."""

import numpy as np
import pytest
import torch
import transformers
from character_model import one_thread  # noqa: F401
from tiny_models import new_model, prompt

import zigzag_ext as zz
from zigzag_ext.cache import ZigzagCache, states
from zigzag_ext.cache.slots import Slots
from zigzag_ext.hf.session import session_of

PLAN = zz.Plan(["retrieval", "streaming", "streaming", "retrieval"], sink=4, window=20)


@pytest.fixture(scope="module")
def session():
    with zz.zigzag(new_model("llama"), PLAN) as model:
        yield session_of(model)


@pytest.fixture(scope="module")
def like(session):
    """A cache after a forward."""
    cache = ZigzagCache(session.model.config, PLAN)
    with torch.no_grad():
        session.run(cache.forward(1, 3), {"input_ids": prompt(3)})
    return cache


@pytest.fixture
def slots(session, like):
    slots = Slots(ZigzagCache(session.model.config, PLAN, max_len=600), 4, like)
    yield slots
    slots.check()
    for row in range(4):
        slots.release(row)
    assert slots.memory_bytes == 0
    slots.check()


@torch.no_grad()
def run(session, slots, rows, ids):
    """Logits [rows, n, vocab] of ids [rows, n] behind what the rows hold."""
    positions = torch.from_numpy(slots.held[rows])[:, None] + torch.arange(ids.shape[1])
    return session.run(slots.forward(rows, ids.shape[1]), {"input_ids": ids, "position_ids": positions}).logits


def read(session, slots, row, length):
    slots.take(row, 600)
    return run(session, slots, [row], prompt(length, seed=length))[:, -1]


@pytest.mark.parametrize("columns", [1, 5, 16])
def test_several_rows_take_several_tokens_as_each_does_alone(session, slots, columns):
    new = prompt(columns, batch=3, seed=9)
    alone = []
    for length, ids in zip((30, 3, 70), new, strict=True):
        read(session, slots, 2, length)
        alone.append(run(session, slots, [2], ids[None]))
        slots.release(2)
    for row, length in zip((3, 0, 2), (30, 3, 70), strict=True):
        read(session, slots, row, length)
    together = run(session, slots, [3, 0, 2], new)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert slots.held.tolist() == [3 + columns, 0, 70 + columns, 30 + columns]


@pytest.mark.parametrize("rows, batch", [([3, 0, 2], 4), ([2], 1), ([2], 3)])
def test_a_step_of_a_fixed_size_skips_what_has_no_row(session, slots, rows, batch):
    """Also row 1, which has no memory: nobody looks at it."""
    for row, length in ((3, 30), (0, 3), (2, 70)):
        read(session, slots, row, length)
    positions = np.zeros((batch, 1), dtype=np.int64)
    positions[: len(rows), 0] = slots.held[rows]
    ids, held = prompt(1, batch=batch, seed=9), slots.held.copy()
    alone = []
    for row, new in zip(rows, ids, strict=False):
        alone.append(run(session, slots, [row], new[None]))
        slots.release(row)
        read(session, slots, row, int(held[row]))
    inputs = {"input_ids": ids, "position_ids": torch.from_numpy(positions)}
    with torch.no_grad():
        logits = session.run(slots.forward(rows, 1, batch=batch), inputs).logits
    torch.testing.assert_close(logits[: len(rows)], torch.cat(alone), atol=1e-4, rtol=1e-4)
    assert (slots.held - held).tolist() == [int(row in rows) for row in range(4)]


def test_a_model_is_told_the_length_of_the_row_that_it_runs(session, slots):
    """Some ask the cache where they are."""
    read(session, slots, 0, 40), read(session, slots, 1, 7)
    seen, layer = [], session.model.model.layers[0]
    handle = layer.register_forward_pre_hook(lambda *args: seen.append(slots.cache.get_seq_length()))
    run(session, slots, [1], prompt(3)), run(session, slots, [1, 0], prompt(1, batch=2))
    handle.remove()
    assert seen == [7, 40]


def test_rows_take_memory_as_they_grow_and_up_to_their_limit(session, slots):
    slots.take(1, 300)
    sizes = []
    for length in (1, 255, 1, 43):
        run(session, slots, [1], prompt(length))
        sizes.append((int(slots.committed[1]), slots.memory_bytes))
    assert [tokens for tokens, _ in sizes] == [256, 256, 300, 300]
    assert [size for _, size in sizes] == [slots.row_memory(tokens) for tokens, _ in sizes]
    with pytest.raises(RuntimeError, match="row 1 was taken for 300 tokens, this forward needs 301; nothing was written"):
        run(session, slots, [1], prompt(1))
    assert slots.held.tolist() == [0, 300, 0, 0]


def test_a_failed_forward_leaves_other_rows_as_they_were(session, slots):
    """Its own may have lost what rings held: they take nothing until they are released."""
    read(session, slots, 0, 40), read(session, slots, 1, 50)
    handle = session.model.model.layers[3].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(session, slots, [1], prompt(30))
    handle.remove()
    with pytest.raises(RuntimeError, match=r"a forward over rows \[1\] has failed: release them first"):
        run(session, slots, [0, 1], prompt(1, batch=2))
    slots.check()
    slots.release(1)
    again = read(session, slots, 1, 50)
    slots.release(1)
    torch.testing.assert_close(read(session, slots, 1, 50), again)
    next_token = run(session, slots, [0], prompt(1))
    slots.release(0)
    read(session, slots, 0, 40)
    torch.testing.assert_close(run(session, slots, [0], prompt(1)), next_token)


BAD = {
    r"distinct rows of 0 to 3, got \[1, 1\]": ([1, 1], 1),
    r"distinct rows of 0 to 3, got \[4\]": ([4], 1),
    r"distinct rows of 0 to 3, got \[\]": ([], 1),
    "a forward over 2 rows takes 1 to 16 tokens of each, got 17; longer ones take a row at a time": ([0, 1], 17),
    "a forward over 1 rows takes 1 to 16 tokens of each, got 0": ([0], 0),
}


def test_forwards_over_the_same_rows_bring_them_to_the_device_once(slots):
    device = slots.cache.attention_layers[0].device
    given = (([2, 0], 4), ([2, 0], 4), ([0, 2], 4), ([2], 2))
    first, again, other, smaller = (slots.forward(rows, 1, batch=size) for rows, size in given)
    rows = first.rows_on(device)
    assert again.rows_on(device) is rows and rows.tolist() == [2, 0, -1, -1]
    assert other.rows_on(device).tolist() == [0, 2, -1, -1] and smaller.rows_on(device).tolist() == [2, -1]
    assert first.rows_on(device).tolist() == rows.tolist() == [2, 0, -1, -1]


def test_a_step_has_a_place_for_each_of_its_rows(slots):
    with pytest.raises(ValueError, match="a step of 1 rows cannot be over 2"), slots.forward([0, 1], 1, batch=1):
        pass


@pytest.mark.parametrize("message", BAD)
def test_what_is_no_forward_is_named(slots, message):
    with pytest.raises(ValueError, match=message), slots.forward(*BAD[message]):
        pass


def test_what_is_no_row_is_named(slots, session, like):
    slots.take(0, 5)
    for row, tokens in ((0, 5), (1, 0), (1, 601)):
        with pytest.raises(ValueError, match=f"row {row} is taken, or {tokens} tokens are not 1 to 600"):
            slots.take(row, tokens)
    for options in ({}, {"max_len": 50, "compress": zz.PromptWindows(budget=0.5)}):
        with pytest.raises(ValueError, match="a cache with a max_len and without compress"):
            Slots(ZigzagCache(session.model.config, PLAN, **options), 2, like)


@pytest.mark.skipif(not states.SERVED, reason=f"transformers {transformers.__version__} has no classes for states")
def test_layers_with_states_are_refused(like):
    hybrid = new_model("qwen3_next")
    with pytest.raises(ValueError, match=r"layers \[0, 2\] keep recurrent or convolution states"):
        Slots(ZigzagCache(hybrid.config, max_len=50), 2, like)


@pytest.mark.parametrize("source", [1, 2], ids=["itself", "another row"])
@pytest.mark.parametrize("length, tokens", [(23, 5), (24, 1), (40, 40), (40, 39), (60, 40)])
def test_a_row_goes_on_from_the_beginning_of_another(session, slots, length, tokens, source):
    """By its rings as they are, one token earlier, while they have not come round, or by a copy of them."""
    ids, new, rings = prompt(length, seed=3), prompt(6, seed=4), None
    slots.take(source, 600)
    for piece in (ids[:, :40], ids[:, 40:]):
        if piece.shape[1]:
            run(session, slots, [source], piece)
            rings = rings if rings is not None else slots.rings_of(source)
    assert slots.reach(min(length, 40), tokens) == tokens
    if source != 1:
        slots.take(1, 500)
        run(session, slots, [1], ids[:, :2])
    slots.resume(1, source, tokens, min(length, 40), None if length <= 40 and source != 1 else rings)
    slots.check()
    assert slots.held[[1, source]].tolist() == [tokens, tokens if source == 1 else length]
    on = [run(session, slots, [1], new), run(session, slots, [1], prompt(1))]
    slots.take(3, 600)
    run(session, slots, [3], ids[:, :tokens])
    for logits in on:
        torch.testing.assert_close(logits, run(session, slots, [3], new if logits is on[0] else prompt(1)), atol=1e-4, rtol=1e-4)


def test_where_rings_cannot_go_back_to_is_no_place(slots, session):
    assert [slots.reach(40, wanted) for wanted in (41, 40, 39, 38, 1)] == [40, 40, 39, 0, 0]
    assert [slots.reach(24, wanted) for wanted in (30, 24, 1)] == [24, 24, 1]
    assert sum(ring.nbytes for ring in slots.rings_of(0)) == slots.ring_row_bytes == slots.ring_bytes // 4
    read(session, slots, 0, 40)
    slots.take(1, 30)
    with pytest.raises(RuntimeError, match="row 1 was taken for 30 tokens, this forward needs 40"):
        slots.resume(1, 0, 40, 40)
    with pytest.raises(ValueError, match="row 0 holds 40 tokens, 41 are to be those of row 1"):
        slots.resume(1, 0, 41, 41)
    with pytest.raises(ValueError, match="row 0 is for 256 to 600 tokens, got 255"):
        slots.extend(0, 255)
    assert slots.held.tolist() == [40, 0, 0, 0]
