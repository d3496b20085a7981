"""An interrupt at every place, and out of memory at every allocation, of all that changes a cache: whole, or marked."""

import contextlib
import copy
import functools

import pytest
import torch
from interrupts import OutOfMemory, Places
from tiny_models import new_model, prompt

import zigzag_ext as zz
from zigzag_ext.attention import store
from zigzag_ext.cache.attending import current

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)
PLANS = {
    "rings": PLAN,
    "retrieval": zz.Plan(["retrieval"] * 4, sink=0, window=1),
    "codes": zz.Plan([("retrieval", "streaming"), "streaming", "retrieval", "retrieval"], sink=4, window=16, kv_format="int8"),
}
HELD, NEW = 30, 20  # rings are full before the new tokens come


@pytest.fixture(autouse=True, scope="module")
def small_addresses():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_FIRST_TOKENS", 1)
        yield


@pytest.fixture(scope="module")
def model():
    with zz.zigzag(new_model("llama"), PLAN, prefill_chunk=8) as model, torch.no_grad():
        yield model


def next_logits(model, cache):
    rows = cache.state.batch if cache.get_seq_length() else 3
    return model(prompt(1, rows, seed=9), past_key_values=cache).logits


def refuses(model, cache, follow, expected, fresh):
    """Whether `cache`, after follow(cache), demands `reset()`, and is then as good as `fresh`, an empty one.

    Otherwise its next logits must be among those `expected`.
    """
    try:
        cache = follow(cache) or cache
        cache.state.check()
        assert cache.state.tokens.columns == cache.state.columns
        found = next_logits(model, cache)
    except RuntimeError as error:
        assert "call reset()" in str(error)
        cache.reset()
        for each in (cache, fresh):
            model(prompt(HELD), past_key_values=each)
        torch.testing.assert_close(next_logits(model, cache), next_logits(model, fresh), atol=1e-5, rtol=1e-5)
        return True
    assert any(found.shape == logits.shape and torch.allclose(found, logits, atol=1e-5, rtol=1e-5) for logits in expected)
    return False


def long_forward(model, cache):
    return model(prompt(NEW, seed=3), past_key_values=cache, logits_to_keep=1)


def failing_forward(model, cache):
    """Behind all layers, so that it goes back."""
    with contextlib.suppress(IndexError):
        model(prompt(3, seed=2), past_key_values=cache, logits_to_keep=torch.tensor([3]))


ACTIONS = {  # what is interrupted, and what it does to a cache that is not interrupted
    "step": lambda model, cache: model(prompt(1, seed=2), past_key_values=cache),
    "chunked_prompt": long_forward,
    "crop": lambda model, cache: cache.crop(-3),
    "crop_rows": lambda model, cache: cache.crop([-3, -1]),
    "reorder": lambda model, cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda model, cache: cache.batch_select_indices(torch.tensor([1])),
    "repeat": lambda model, cache: cache.batch_repeat_interleave(2),
    "reset": lambda model, cache: cache.reset(),
    "reserve": lambda model, cache: cache.reserve(500),  # retrieval layers move: see `small_addresses`
    "keep_first": lambda model, cache: cache.keep_first(prompt(HELD)[:, : HELD - 2]),
    "failing": failing_forward,
    "compress": lambda model, cache: cache.compress(),
    "other_rows": lambda model, cache: model(prompt(3, 3), past_key_values=cache),  # of a cache that is empty again
}
METHOD = zz.PromptWindows(budget=14, window=3, observe=4)  # of the caches of "compress"
FOLLOWING = [  # what is done next, before the cache is asked for its next logits
    lambda cache: cache,
    copy.deepcopy,
    lambda cache: cache.get_seq_length() and cache.crop(-1),
    lambda cache: cache.reserve(3),
    lambda cache: cache.state.batch and cache.reorder_cache(torch.arange(cache.state.batch)),
]


KINDS = {
    "line": functools.partial(Places, own=True),
    "any_line": Places,
    "instruction": functools.partial(Places, opcodes=True),
    "allocation": OutOfMemory,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_failure_at_any_place(model, action, plan, kind, request, record_property):
    """The cache answers as before or as after the action, or refuses with the reason; whatever is done with it next."""
    rows = 2 if action in ("crop_rows", "reorder", "select") else 1
    options = {"rollback": 4, "compress": METHOD if action == "compress" else None}
    following = FOLLOWING[:2] + FOLLOWING[3:] if action == "compress" else FOLLOWING  # a compressed prompt is not cropped
    act, start = ACTIONS[action], zz.ZigzagCache(model.config, PLANS[plan], **options)
    model(prompt(HELD, rows), past_key_values=start)
    if action == "other_rows":
        start.reset()
    done = copy.deepcopy(start)
    counted = KINDS[kind]()
    assert not counted.run(lambda: act(model, done))

    def next_after(follow, cache):
        cache = copy.deepcopy(cache)
        return next_logits(model, follow(cache) or cache)

    stride = 1 if request.config.getoption("--long") else max(2, counted.count // 10)
    expected = [[next_after(follow, cache) for cache in (start, done)] for follow in following]
    failed = marked = 0
    for number, at in enumerate(range(1, counted.count + 1, stride)):
        cache, way = copy.deepcopy(start), number % len(following)
        failed += KINDS[kind](at).run(lambda cache=cache: act(model, cache))
        assert current() is None
        fresh = zz.ZigzagCache(model.config, PLANS[plan], **options)
        marked += refuses(model, cache, following[way], expected[way], fresh)
    record_property(f"count of places, kind {kind}", failed)
    record_property(f"count of those after which reset() is demanded, kind {kind}", marked)
    assert failed >= 0.9 * (number + 1)  # a finalizer may have run while they were counted
