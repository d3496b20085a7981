"""Compressed prompts at the edges: padding anywhere, rows of their own lengths, what is taken back, copies, speculation."""

import copy

import pytest
import torch
from tiny_models import generate, new_model, padded_prompt, prompt

import zigzag_ext as zz
from zigzag_ext.cache.compression import METHODS
from zigzag_ext.hf.session import session_of

SINK, WINDOW, LENGTH, BUDGET = 4, 16, 200, 60
KINDS = ["streaming", "retrieval"] * 2
PLANS = {
    "layers": zz.Plan(KINDS, sink=SINK, window=WINDOW),
    "heads": zz.Plan([("retrieval", "streaming"), "streaming", "retrieval", "streaming"], sink=SINK, window=WINDOW),
    "int4": zz.Plan(KINDS, sink=SINK, window=WINDOW, kv_format="int4"),
}
PLAN = PLANS["layers"]
METHOD = zz.PromptWindows(budget=BUDGET, window=4, observe=8, per_head=True)
CLOSE = {"atol": 5e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def model():
    with zz.zigzag(new_model("llama"), PLAN) as model, torch.no_grad():
        yield model


def cache_of(model, plan=PLAN, method=METHOD, **options):
    return zz.ZigzagCache(model.config, plan, compress=method, **options)


def held(cache, row: int = 0) -> list[torch.Tensor]:
    """Keys of a row in all retrieval layers."""
    stores = [store for layer in cache.layers for store in layer.stores if store.lengths]
    return [store.read(0, int(cache.state.lengths_on(store.device)[store.lengths][row]))[0][row] for store in stores]


def check_row(cache, row: int, alone) -> None:
    """Whether the row holds what a cache of this row alone holds."""
    for found, expected in zip(held(cache, row), held(alone), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def read(model, cache, ids, mask, **options):
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, **options).logits


def step_like(model, caches, seed=11):
    """Logits of one more token, the same for each of the caches."""
    return [model(prompt(1, seed=seed), past_key_values=cache).logits for cache in caches]


def test_a_prompt_shorter_than_what_observes_stays_until_a_longer_one_comes(model):
    cache, full = cache_of(model), zz.ZigzagCache(model.config, PLAN)
    for each in (cache, full):
        model(prompt(5), past_key_values=each)
    assert torch.equal(*step_like(model, (cache, full))) and not cache.compressed
    again = cache_of(model)
    model(torch.cat([prompt(5), prompt(1, seed=11)], 1), past_key_values=again)
    for each in (cache, again):
        model(prompt(LENGTH, seed=2), past_key_values=each)
        each.compress()
    assert cache.compressed == again.compressed and cache.compressed[1][0] <= BUDGET
    check_row(cache, 0, again)


@pytest.mark.parametrize("chunk", [None, 48], ids=["one_shot", "pieces"])
@pytest.mark.parametrize("where", ["left", "right", "inside"])
@pytest.mark.parametrize("plan", ["layers", "heads"])
def test_padded_rows_choose_as_if_they_were_alone(where, plan, chunk):
    """Pieces that are padding to some rows bring them no queries."""
    lengths = [LENGTH, 100, 3, 130]
    mask = torch.zeros(len(lengths), LENGTH, dtype=torch.long)
    for row, n in enumerate(lengths):
        tokens = torch.arange(n)
        if where == "inside" and n < LENGTH:
            tokens[n // 2 :] += LENGTH - n - 7
        mask[row, tokens + (LENGTH - n if where == "left" else 0)] = 1
    ids = prompt(LENGTH, len(lengths)) * mask
    with zz.zigzag(new_model("llama"), PLANS[plan], prefill_chunk=chunk) as model, torch.no_grad():
        cache = cache_of(model, PLANS[plan])
        read(model, cache, ids, mask, logits_to_keep=1)
        cache.compress()
        for row, n in enumerate(lengths):
            alone = cache_of(model, PLANS[plan])
            model(ids[row : row + 1, mask[row] > 0], past_key_values=alone)
            alone.compress()
            assert bool(alone.compressed) == (n > BUDGET)
            check_row(cache, row, alone)


def test_a_later_turn_with_padding_chooses_by_its_tokens(model):
    """The first turn is short, so that the second one is compressed with it; its padding does not observe."""
    method = zz.PromptWindows(budget=82, window=2, observe=60)
    first, second = padded_prompt([80, 80]), padded_prompt([150, 17], seed=2)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    cache = cache_of(model, method=method)
    for turn, seen in ((first, first["attention_mask"]), (second, mask)):
        read(model, cache, turn["input_ids"], seen)
        cache.compress()
    for row, n in enumerate((150, 17)):
        alone = cache_of(model, method=method)
        for ids in (first["input_ids"], second["input_ids"][:, -n:]):
            model(ids[row : row + 1], past_key_values=alone)
            alone.compress()
        assert alone.compressed
        check_row(cache, row, alone)


@pytest.mark.parametrize("removed", [-3, [-3, 0], [0, -4]])
def test_tokens_taken_back_before_the_prompt_ends_do_not_observe(model, removed):
    ids = prompt(LENGTH, 2)
    cache = cache_of(model, rollback=4)
    model(ids, past_key_values=cache)
    cache.crop(removed)
    cache.compress()
    assert cache.compressed
    for row, n in enumerate(removed if isinstance(removed, list) else [removed] * 2):
        alone = cache_of(model, rollback=4)
        model(ids[row : row + 1, : LENGTH + n], past_key_values=alone)
        alone.compress()
        check_row(cache, row, alone)


def test_a_prompt_whose_last_tokens_are_all_taken_back_stays_whole():
    plan = zz.Plan(["retrieval"] * 4, sink=0, window=1)
    with zz.zigzag(new_model("llama"), plan) as model, torch.no_grad():
        cache, full = cache_of(model, plan), zz.ZigzagCache(model.config, plan)
        for each in (cache, full):
            model(prompt(LENGTH, 2), past_key_values=each)
            each.crop([-50, 0])
        cache.compress()
        assert cache.state.left_out[1:].tolist() == [[0, LENGTH - BUDGET]] * 4
        step = {"input_ids": prompt(1, 2, seed=4), "position_ids": cache.seq_lens[:, None].long()}
        found, expected = (session_of(model).step(each, [1, 1], **step).logits for each in (cache, full))
        torch.testing.assert_close(found[0], expected[0], **CLOSE)


def test_rows_of_their_own_lengths_grow_by_numbers_of_their_own(model):
    """A row that dropped little has slots for what it gets, though the longest row, which dropped more, gets nothing."""
    lengths, turn = [400, 70], 700
    first, second = padded_prompt(lengths), padded_prompt([1, turn], seed=2)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    cache = cache_of(model)
    read(model, cache, first["input_ids"], first["attention_mask"])
    cache.compress()
    found = read(model, cache, second["input_ids"], mask)
    for row, (n, more) in enumerate(zip(lengths, (1, turn), strict=True)):
        alone = cache_of(model)
        model(first["input_ids"][row : row + 1, -n:], past_key_values=alone)
        alone.compress()
        expected = model(second["input_ids"][row : row + 1, -more:], past_key_values=alone).logits
        torch.testing.assert_close(found[row, -1], expected[0, -1], **CLOSE)
        check_row(cache, row, alone)


@pytest.mark.parametrize("row", [0, 1])
def test_one_row_that_is_kept_goes_on_alone(model, row):
    lengths, more = [400, 40], 600
    first = padded_prompt(lengths)
    cache, alone = cache_of(model), cache_of(model)
    read(model, cache, first["input_ids"], first["attention_mask"])
    model(first["input_ids"][row : row + 1, -lengths[row] :], past_key_values=alone)
    for each in (cache, alone):
        each.compress()
    cache.batch_select_indices(torch.tensor([row]))
    assert cache.kv_bytes() == alone.kv_bytes() and cache.compressed == alone.compressed
    assert cache.memory_report().splitlines()[:2] and bool(alone.compressed) == (row == 0)
    mask = torch.cat([first["attention_mask"][row : row + 1], torch.ones(1, more, dtype=torch.long)], 1)
    found, ids = read(model, cache, prompt(more, seed=5), mask), prompt(more, seed=5)
    torch.testing.assert_close(found[0, -1], model(ids, past_key_values=alone).logits[0, -1], **CLOSE)
    check_row(cache, 0, alone)


def test_a_crop_never_ends_within_a_compressed_prompt(model):
    """Steps that leave a padded row out do not make room for it."""
    first = padded_prompt([LENGTH, 100])
    cache, mask = cache_of(model, rollback=12), first["attention_mask"]
    read(model, cache, first["input_ids"], mask)
    for step in range(3):
        mask = torch.cat([mask, torch.tensor([[1], [0]])], 1)
        read(model, cache, prompt(1, 2, seed=step), mask)
    cache.crop(-3)
    before = cache.seq_lens.clone()
    with pytest.raises(RuntimeError, match=r"compressed prompt.*nothing was changed"):
        cache.crop(-1)
    with pytest.raises(RuntimeError, match=r"compressed prompt.*nothing was changed"):
        cache.crop([0, -1])
    assert cache.seq_lens.equal(before) and before.tolist() == [LENGTH, 100]


def test_max_len_counts_tokens_and_not_slots(model):
    cache = cache_of(model, max_len=LENGTH + 5)
    model(prompt(LENGTH), past_key_values=cache)
    for seed in range(5):
        model(prompt(1, seed=seed), past_key_values=cache)
    assert cache.compressed[1] == (BUDGET + 5, LENGTH - BUDGET)
    with pytest.raises(RuntimeError, match=rf"max_len is {LENGTH + 5} tokens, this forward needs {LENGTH + 6}"):
        model(prompt(1), past_key_values=cache)


def test_copies_before_and_after(model):
    cache = cache_of(model)
    model(prompt(LENGTH), past_key_values=cache)
    before = copy.deepcopy(cache)
    cache.compress()
    after = copy.deepcopy(cache)
    assert not before.compressed and before.state.observed and after.compressed == cache.compressed
    for turn in range(2):
        first, *others = step_like(model, (cache, before, after), seed=turn)
        assert all(first.equal(other) for other in others)
    assert before.compressed == cache.compressed


def test_another_method_by_hand(model):
    cache = cache_of(model)
    model(prompt(LENGTH), past_key_values=cache)
    for name, expected in [("recent", 80), ("snapkv", 80), ("chunkkv", 80)]:
        twin, own = copy.deepcopy(cache), cache_of(model, method=METHODS[name](budget=80, observe=8))
        twin.compress(METHODS[name](budget=80, observe=8))
        model(prompt(LENGTH), past_key_values=own)
        own.compress()
        assert twin.compressed == own.compressed and expected - 10 < own.compressed[1][0] <= expected
        check_row(twin, 0, own)
    for method, error, message in [
        (zz.PromptWindows(budget=0.5, observe=9), ValueError, "observe=8"),
        (0.5, TypeError, "a method such as"),
        (zz.PromptWindows(budget=12, observe=8), ValueError, "sink"),
    ]:
        with pytest.raises(error, match=message):
            cache.compress(method)
    assert not cache.compressed and cache.state.observed


def test_a_conversation_that_goes_on_before_a_step(model):
    """A call that generates one token ends before the prompt is compressed; the next call's prompt ends it."""
    ids = prompt(LENGTH)
    cache, fresh = cache_of(model), cache_of(model)
    generate(model, 1, ids, past_key_values=cache)
    assert not cache.compressed
    longer = torch.cat([ids, prompt(40, seed=3)], 1)
    assert generate(model, 6, longer, past_key_values=cache).equal(generate(model, 6, longer, past_key_values=fresh))
    check_row(cache, 0, fresh)


def test_without_a_cache_nothing_is_dropped(model):
    ids = prompt(LENGTH)
    plain = generate(model, 4, ids, use_cache=False)
    with zz.zigzag(new_model("llama"), PLAN, compress=METHOD) as other, torch.no_grad():
        assert generate(other, 4, ids, use_cache=False).equal(plain)
        assert other(ids, use_cache=False).logits.equal(model(ids, use_cache=False).logits)


def test_every_copy_of_the_lengths_is_lowered(model):
    """Where layers are spread over devices, each has one."""
    cache = cache_of(model)
    model(prompt(LENGTH), past_key_values=cache)
    home = next(iter(cache.state.seq_lens))
    elsewhere = torch.device("cpu", 1)
    cache.state.seq_lens[elsewhere] = cache.state.seq_lens[home].clone()
    cache.compress()
    assert cache.state.seq_lens[elsewhere].equal(cache.state.seq_lens[home])
    assert cache.state.seq_lens[home][2].tolist() == [cache.compressed[1][0]]


@pytest.mark.parametrize("lengths", [[LENGTH], [LENGTH, 30, 120]], ids=["one", "ragged"])
@pytest.mark.parametrize("draft", ["lookup", "streaming"])
@pytest.mark.parametrize("plan", PLANS)
def test_speculation_on_a_compressed_prompt(plan, draft, lengths):
    """Rounds take drafts back behind the prompt, and the tokens are those of plain decoding."""
    batch = padded_prompt(lengths)
    with zz.zigzag(new_model("llama"), PLANS[plan]) as model, torch.no_grad():
        plain, cache = cache_of(model, PLANS[plan]), cache_of(model, PLANS[plan], rollback=16)
        expected = generate(model, 24, **batch, past_key_values=plain)
        speculation = zz.speculate(draft=draft, window=24)
        found = generate(model, 24, **batch, past_key_values=cache, custom_generate=speculation)
        assert found.equal(expected) and cache.compressed.keys() == plain.compressed.keys()
        assert draft == "lookup" or speculation.report.drafted["streaming"] > 0
