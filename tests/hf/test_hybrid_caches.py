"""Caches with recurrent and convolution states beside keys: rows, copies, files, failures, and what cannot go back."""

import copy

import numpy as np
import pytest
import torch
import transformers
from against_stock import streaming_plan
from dense_oracle import close
from tiny_models import generate, new_model, padded_prompt, prompt

import zigzag_ext as zz
from zigzag_ext.cache import states
from zigzag_ext.cache.states import HybridLayer, StateLayer
from zigzag_ext.hf import session
from zigzag_ext.hf.cache_argument import cache_argument
from zigzag_ext.hf.step_cache import StepCache

pytestmark = pytest.mark.skipif(not states.SERVED, reason=f"transformers {transformers.__version__} has no classes for states")
FAMILIES = ["lfm2", "falcon_h1"]  # convolutions in layers of their own; a recurrence beside each attention


@pytest.fixture(params=FAMILIES)
def model(request):
    model = new_model(request.param)
    with zz.zigzag(model, streaming_plan(model)), torch.no_grad():
        yield model


@pytest.fixture
def cache(model):
    return new_cache(model)


def new_cache(model, **options) -> zz.ZigzagCache:
    return zz.ZigzagCache(model.config, streaming_plan(model), **options)


def read(model, cache, ids, **options) -> torch.Tensor:
    """Logits of the last token."""
    return model(ids, **cache_argument(model, cache), **options).logits[:, -1]


def contents(cache) -> dict[str, torch.Tensor]:
    return {f"{each.index}.{name}": tensor.clone() for each in cache.states for name, tensor in each.tensors.items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_layers_are_those_of_the_config(model, cache):
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == (
        [HybridLayer] * 4 if model.config.model_type == "falcon_h1" else [StateLayer, zz.cache.layer.ZigzagLayer] * 2
    )
    read(model, cache, prompt(20, batch=2))
    held = sum(tensor.nbytes for tensor in contents(cache).values())
    assert held > 0 and f"{held:,} bytes in" in next(line for line in cache.memory_report().splitlines() if "state" in line)
    assert cache.memory_bytes() == held + sum(store.memory_bytes for store in cache.stores)
    assert cache.get_seq_length() == 20 and not cache.is_croppable and cache.has_previous_state()


def test_selected_rows_go_on_as_they_were(model, cache):
    ids, more = prompt(20, batch=3), prompt(5, batch=3, seed=2)
    read(model, cache, ids)
    for change, rows in [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices([True, False, True]), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ]:
        changed, fresh = copy.deepcopy(cache), new_cache(model)
        addresses = {name: tensor.data_ptr() for each in changed.states for name, tensor in each.tensors.items()}
        change(changed)
        read(model, fresh, ids[rows])
        assert close(read(model, changed, more[rows]), read(model, fresh, more[rows])), rows
        if len(rows) == 3:
            assert addresses == {name: tensor.data_ptr() for each in changed.states for name, tensor in each.tensors.items()}


def test_a_copy_is_another_cache(model, cache):
    ids = prompt(12)
    read(model, cache, ids)
    before, other = contents(cache), copy.deepcopy(cache)
    read(model, other, prompt(3, seed=2))
    assert equal(contents(cache), before) and not equal(contents(other), before)


def test_reset_starts_again_on_the_same_buffers(model, cache):
    ids = prompt(15)
    first = read(model, cache, ids)
    buffers = {name: tensor.data_ptr() for each in cache.states for name, tensor in each.tensors.items()}
    cache.reset()
    assert read(model, cache, ids).equal(first)
    assert buffers == {name: tensor.data_ptr() for each in cache.states for name, tensor in each.tensors.items()}
    cache.reset()
    assert close(read(model, cache, prompt(9, batch=2)), read(model, new_cache(model), prompt(9, batch=2)))


def test_states_follow_the_dtype_of_a_model_while_they_hold_nothing(model, cache):
    ids = prompt(15)
    read(model, cache, ids)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="holds a? ?float32"):
        read(model, cache, prompt(3))
    cache.reset()
    assert read(model, cache, ids).equal(read(model, new_cache(model), ids))


def test_tokens_are_not_taken_back(model):
    cache, ids = new_cache(model, rollback=20), prompt(12)
    read(model, cache, ids)
    before = contents(cache)
    stateful = "assisted generation is not supported with stateful models"  # by transformers itself, in some families
    for call in (
        lambda: cache.crop(-1),
        lambda: cache.crop(5),
        lambda: generate(model, 2, torch.cat([ids[:, :6], prompt(6, seed=2)], 1), cache=cache),
        lambda: generate(model, 4, prompt(14), cache=new_cache(model, rollback=20), prompt_lookup_num_tokens=3),
        lambda: generate(model, 4, prompt(14), custom_generate=zz.speculate("lookup")),
    ):
        with pytest.raises((RuntimeError, ValueError), match=f"which the recurrent or convolution states of layers|{stateful}"):
            call()
    assert equal(contents(cache), before)
    assert close(read(model, cache, prompt(3, seed=3)), read(model, new_cache(model), torch.cat([ids, prompt(3, seed=3)], 1)))
    cache.crop(-15)
    assert close(read(model, cache, ids), read(model, new_cache(model), ids))


def test_a_conversation_goes_on_where_it_stopped(model, cache):
    ids = prompt(20)
    answer = generate(model, 6, ids, cache=cache)
    longer = torch.cat([ids, answer, prompt(7, seed=2)], 1)
    assert generate(model, 6, longer, cache=cache).equal(generate(model, 6, longer))


def test_a_first_forward_that_fails_leaves_an_empty_cache(model, cache, monkeypatch):
    ids = prompt(12)
    fail_after(model, 2, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        read(model, cache, ids)
    monkeypatch.undo()
    assert cache.get_seq_length() == 0
    assert read(model, cache, ids).equal(read(model, new_cache(model), ids))


def test_a_later_forward_that_fails_marks_what_states_have_taken_in(model, cache, monkeypatch):
    ids = prompt(12)
    read(model, cache, ids)
    before = contents(cache)
    with pytest.raises(ValueError, match="attention_mask must be"):
        read(model, cache, prompt(3), attention_mask=torch.ones(1, 4))
    fail_after(model, 0, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        read(model, cache, prompt(3))
    assert equal(contents(cache), before) and cache.get_seq_length() == 12
    monkeypatch.undo()
    fail_after(model, 3, monkeypatch)
    with pytest.raises(ZeroDivisionError):
        read(model, cache, prompt(3))
    monkeypatch.undo()
    taken = {0, 2} if model.config.model_type == "lfm2" else {0, 1, 2}
    match = (
        rf"states of layers \[{', '.join(map(str, sorted(taken)))}\] may have taken its tokens in, the ZigzagCache is not whole"
    )
    for call in (lambda: read(model, cache, prompt(3)), lambda: cache.crop(-1), lambda: cache.reorder_cache(torch.tensor([0]))):
        with pytest.raises(RuntimeError, match=match):
            call()
    cache.reset()
    assert close(read(model, cache, ids), read(model, new_cache(model), ids))


def fail_after(model, layers: int, monkeypatch) -> None:
    """The model's layer number `layers` raises ZeroDivisionError."""

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(model.model.layers[layers], "forward", fail)


def test_files(model, cache, tmp_path):
    ids, more = padded_prompt([20, 13]), prompt(4, batch=2, seed=2)
    read(model, cache, ids["input_ids"], attention_mask=ids["attention_mask"])
    cache.save(tmp_path / "x.cache")
    loaded = zz.ZigzagCache.load(tmp_path / "x.cache", model)
    assert equal(contents(loaded), contents(cache))
    mask = torch.cat([ids["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    assert read(model, loaded, more, attention_mask=mask).equal(read(model, cache, more, attention_mask=mask))


def test_padding_is_masked_in_every_piece(model, monkeypatch):
    """Chunks that would end in a piece of one column of padding, which transformers masks nowhere."""
    batch = padded_prompt([22, 1])
    expected = generate(model, 5, **batch)
    zz.disable(model)
    for chunk in (20, 7, 1):
        with zz.zigzag(model, streaming_plan(model), prefill_chunk=chunk):
            pieces = record_pieces(monkeypatch)
            assert generate(model, 5, **batch).equal(expected), f"pieces of {chunk}"
            assert len(pieces) > 1 and min(pieces) > 1 and max(pieces) <= max(chunk, 2) + 1
    zz.enable(model, streaming_plan(model))
    cache = new_cache(model)
    read(model, cache, batch["input_ids"], attention_mask=batch["attention_mask"])
    before = contents(cache)
    with pytest.raises(ValueError, match="leaves a row out of a forward of one token"):
        read(model, cache, prompt(1, batch=2), attention_mask=torch.cat([batch["attention_mask"], torch.tensor([[1], [0]])], 1))
    assert equal(contents(cache), before)


def record_pieces(monkeypatch) -> list[int]:
    """Columns of each piece of the prompts to come."""
    columns: list[int] = []
    pieces_of = session.pieces_of

    def recorded(model, forward, kwargs, chunk):
        pieces = pieces_of(model, forward, kwargs, chunk)
        columns.extend(piece["input_ids"].shape[1] for piece in pieces if forward.total > 1)
        return pieces

    monkeypatch.setattr(session, "pieces_of", recorded)
    return columns


def test_a_step_that_does_not_count_leaves_states_as_they_are(model, cache):
    ids = prompt(12)
    read(model, cache, ids)
    before = contents(cache)
    lengths = cache.state.lengths_on(torch.device("cpu"))
    view = StepCache(cache, lengths, torch.zeros_like(lengths[0]))
    with view.states_kept():
        for tensor in view.state_tensors:
            tensor.fill_(7.0)
        assert not equal(contents(cache), before)
    assert equal(contents(cache), before)


def test_plans_and_scores_cover_the_layers_that_attend():
    model = new_model("lfm2")
    windows = zz.native_windows(model.config)
    plan = zz.solve(np.array([[0.9, 0.8], [0.1, 0.2]]), retrieval_layers=1, sink=2, window=5, config=model.config)
    assert windows == (0, None, 0, None) and plan.kinds == ("state", "retrieval", "state", "streaming")
    zz.enable(model, plan)
    assert generate(model, 3, prompt(20)).shape == (1, 3)
    for wrong, words in [
        (zz.Plan(["retrieval"] * 2, sink=2, window=5), "of which 1 3 are full-attention layers and the others without keys"),
        (zz.Plan(["retrieval"] * 4, sink=2, window=5), "layer 0 has no keys in the model, full attention in the plan"),
    ]:
        with pytest.raises(ValueError, match=words):
            zz.ZigzagCache(model.config, wrong)


def test_states_that_were_made_in_inference_mode_outlive_it(model, cache):
    ids, more = prompt(12, batch=2), prompt(3, batch=2, seed=2)
    with torch.inference_mode():
        read(model, cache, ids)
    cache.reorder_cache(torch.tensor([1, 0]))
    expected = new_cache(model)
    read(model, expected, ids[[1, 0]])
    assert close(read(model, cache, more), read(model, expected, more))


def test_a_compressed_prompt_drops_keys_and_keeps_states(model):
    cache, whole, ids = new_cache(model, compress=zz.PromptWindows(budget=0.5)), new_cache(model), prompt(300)
    for each in (cache, whole):
        read(model, each, ids)
    before = contents(cache)
    cache.compress()
    assert cache.compressed.keys() == set(streaming_plan(model).retrieval_layers) and equal(contents(cache), before)
    assert not close(read(model, cache, prompt(3)), read(model, whole, prompt(3)))
