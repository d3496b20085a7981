"""Rows that are reordered, selected and repeated, and tokens taken back: what is wrong, or finds no memory, changes nothing."""

import copy

import numpy as np
import pytest
import torch
from interrupts import OutOfMemory
from processes import run
from tiny_models import new_model, prompt

import zigzag_ext as zz
from zigzag_ext.attention import buffers

PLANS = {
    "rings": zz.Plan(["streaming", "retrieval"], sink=4, window=16),
    "codes": zz.Plan([("retrieval", "streaming"), "retrieval"], sink=4, window=16, kv_format="int8", key_smoothing=True),
}


@pytest.fixture(scope="module")
def model():
    with zz.zigzag(new_model("llama", num_hidden_layers=2), PLANS["rings"]) as model, torch.no_grad():
        yield model


def filled(model, plan="rings", rollback=0):
    cache = zz.ZigzagCache(model.config, PLANS[plan], rollback=rollback)
    model(prompt(30, 2), past_key_values=cache)
    return cache


def next_logits(model, cache):
    return model(prompt(1, cache.state.batch, seed=9), past_key_values=copy.deepcopy(cache)).logits


ONE_DIMENSION, INTEGERS, EACH_ROW = "of one dimension", "row numbers in int32 or int64", r"a mask of \[2\] bools, one per row"
TOKENS, ROWS = "must be an integer number of tokens", "rows must be in"
REFUSED = [
    ("reorder_cache", torch.tensor([0.0, 1.0]), TypeError, INTEGERS),
    ("reorder_cache", torch.tensor([True, False]), TypeError, INTEGERS),
    ("reorder_cache", torch.tensor([0, 1], dtype=torch.uint8), TypeError, INTEGERS),
    ("reorder_cache", torch.tensor([[0, 1]]), ValueError, ONE_DIMENSION),
    ("reorder_cache", torch.tensor(1), ValueError, ONE_DIMENSION),
    ("reorder_cache", torch.tensor([0, 2]), IndexError, ROWS),
    ("reorder_cache", torch.tensor([0, -1]), IndexError, ROWS),
    ("reorder_cache", "01", TypeError, "takes row numbers, got '01'"),
    ("batch_select_indices", [0.5], TypeError, INTEGERS),
    ("batch_select_indices", [[0, 1]], ValueError, ONE_DIMENSION),
    ("batch_select_indices", [0, 7], IndexError, ROWS),
    ("batch_select_indices", [], ValueError, "at least one row"),
    ("batch_select_indices", torch.tensor([True]), ValueError, EACH_ROW),
    ("batch_select_indices", [True, False, True], ValueError, EACH_ROW),
    ("batch_select_indices", torch.tensor([[True, False]]), ValueError, EACH_ROW),
    ("batch_select_indices", torch.tensor([False, False]), ValueError, "at least one row"),
    ("batch_select_indices", None, TypeError, "takes row numbers, got None"),
    ("batch_repeat_interleave", 0, ValueError, "takes 1 to"),
    ("batch_repeat_interleave", -1, ValueError, "takes 1 to"),
    ("batch_repeat_interleave", 2.0, TypeError, "repeats must be an integer, got 2.0"),
    ("batch_repeat_interleave", True, TypeError, "repeats must be an integer, got True"),
    ("batch_repeat_interleave", 1 << 30, MemoryError, "out of memory: .* nothing was changed"),
    ("crop", 28.5, TypeError, TOKENS),
    ("crop", "28", TypeError, TOKENS),
    ("crop", True, TypeError, TOKENS),
    ("crop", None, TypeError, TOKENS),
    ("crop", [-1.5, -1], TypeError, TOKENS),
    ("crop", np.array([-1.0, -1.0]), TypeError, TOKENS),
    ("crop", [[-1], [-1, -2]], TypeError, "takes integer numbers of tokens"),
    ("crop", [-1, -1, -1], ValueError, "one per row of 2"),
    ("crop", 1 << 70, ValueError, "does not fit 64 bits"),
    ("crop", -(1 << 63), ValueError, "does not fit 64 bits"),
    ("reserve", 1.5, TypeError, TOKENS),
    ("reserve", "3", TypeError, TOKENS),
    ("reserve", -1, ValueError, "takes 0 to 2.30 tokens"),
    ("reserve", (1 << 63) - 1, ValueError, "takes 0 to 2.30 tokens"),
    ("write_ahead", [1.5, 1], TypeError, TOKENS),
    ("write_ahead", [-1, 1], ValueError, "numbers of 0 to"),
    ("write_ahead", [1], ValueError, "numbers of 0 to"),
]


@pytest.mark.parametrize("call,given,error,words", REFUSED, ids=lambda each: str(each)[:40])
def test_what_is_wrong_is_refused_and_changes_nothing(model, call, given, error, words):
    cache = filled(model, rollback=4)
    expected = next_logits(model, cache)
    with pytest.raises(error, match=words):
        getattr(cache, call)(given)
    assert next_logits(model, cache).equal(expected)


def test_counts_of_a_forward_are_integers(model):
    cache = filled(model)
    with pytest.raises(TypeError, match=TOKENS):
        cache.forward(2, 2, counts=[1.5, 1]).__enter__()
    assert cache.get_seq_length() == 30 and cache.state.changing is None


GOOD = [
    ("reorder_cache", torch.tensor([1, 0], dtype=torch.int32), [1, 0]),
    ("batch_select_indices", np.array([1]), [1]),
    ("batch_select_indices", [False, True], [1]),
    ("batch_select_indices", torch.tensor([1, 1, 0]), [1, 1, 0]),
    ("batch_repeat_interleave", np.int64(2), [0, 0, 1, 1]),
]


@pytest.mark.parametrize("call,given,rows", GOOD, ids=lambda each: str(each)[:40])
@pytest.mark.parametrize("plan", PLANS)
def test_rows_have_what_they_are_to_have(model, plan, call, given, rows):
    cache, other = filled(model, plan), filled(model, plan)
    getattr(cache, call)(given)
    new = prompt(1, 2, seed=9)
    expected = model(new, past_key_values=other).logits[rows]
    torch.testing.assert_close(model(new[rows], past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize(
    "call,rows", [("reorder_cache", [0, 0]), ("batch_select_indices", [0]), ("batch_select_indices", [0] * 3)], ids=str
)
def test_the_longest_row_may_go(model, call, rows, with_mask):
    """Rows that end at different columns: those that stay have no more columns than they need."""
    cache, other = filled(model, rollback=4), filled(model, rollback=4)
    cache.crop([-3, -1])
    getattr(cache, call)(torch.tensor(rows))
    other.crop(-3)
    other.batch_select_indices(rows)
    assert cache.get_seq_length() == cache.state.tokens.columns == 27
    for q_len in (1, 3, 20):
        new = {"input_ids": prompt(q_len, len(rows), seed=q_len)}
        mask = {"attention_mask": torch.ones(len(rows), cache.get_seq_length() + q_len)} if with_mask else {}
        expected = model(**new, past_key_values=other).logits
        torch.testing.assert_close(model(**new, **mask, past_key_values=cache).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("call,given", [("batch_repeat_interleave", 2), ("batch_select_indices", [1])], ids=str)
@pytest.mark.parametrize("plan", PLANS)
def test_no_memory_for_other_rows_leaves_those_that_there_are(model, plan, call, given):
    cache, failed = filled(model, plan), 0
    expected = next_logits(model, cache)
    while OutOfMemory(failed + 1).run(lambda: getattr(cache, call)(given)):
        failed += 1
        assert cache.state.changing is None and next_logits(model, cache).equal(expected)
    assert failed > 10 and cache.state.batch == (4 if given == 2 else 1)


def test_memory_is_looked_for_once_and_for_all_layers(model, monkeypatch):
    cache = filled(model)
    taken, before = sum(size for holder in cache.holders for _, size in holder.memory_with_rows(2)), cache.memory_bytes()
    assert taken == before
    monkeypatch.setattr(buffers, "free_bytes", lambda device: 4 * before - 1)
    with pytest.raises(MemoryError, match=f"out of memory: {4 * before:,} bytes are needed on cpu"):
        cache.batch_repeat_interleave(4)
    cache.batch_repeat_interleave(3)
    assert cache.memory_bytes() == 3 * before


def test_a_limit_of_addresses_leaves_a_cache_as_it_was():
    run("""
        import copy, resource
        import torch
        import zigzag_ext as zz
        from tiny_models import new_model, prompt
        plan = zz.Plan(["retrieval"] * 32, sink=0, window=1)
        model = zz.enable(new_model("llama", num_hidden_layers=32), plan)
        cache = zz.ZigzagCache(model.config, plan)
        with torch.no_grad():
            model(prompt(30), past_key_values=cache)
            expected = model(prompt(1, seed=9), past_key_values=copy.deepcopy(cache)).logits
            used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
            resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), resource.RLIM_INFINITY))
            try:
                cache.batch_repeat_interleave(8)
            except MemoryError as error:
                assert "RLIMIT_AS (ulimit -v)" in str(error), error
            else:
                raise AssertionError("no error")
            assert model(prompt(1, seed=9), past_key_values=cache).logits.equal(expected)
    """)
