"""Padding anywhere: columns that a mask leaves out are never stored, and the others come out as if these were not there."""

import pytest
import torch
from tiny_models import NUM_LAYERS, generate, new_model, prompt, tiny_model

import zigzag_ext as zz

SINK, WINDOW = 4, 16
PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=SINK, window=WINDOW)
HEADS = zz.Plan(["streaming", "retrieval", ["streaming", "retrieval"], "streaming"], sink=SINK, window=WINDOW)
WIDTH = 40


def masks() -> dict[str, torch.Tensor]:
    column = torch.arange(WIDTH)
    random = torch.rand(2, WIDTH, generator=torch.Generator().manual_seed(3)) < 0.6
    rows = {
        "right": [column < 40, column < 23],
        "inside": [(column < 10) | (column >= 25), (column < 1) | (column >= 5)],
        "both_sides": [(column >= 7) & (column < 30), column < 39],
        "a_row_of_none_of_the_last": [column < 40, column < 8],
        "random": list(random),
    }
    return {name: torch.stack(each).long() for name, each in rows.items()}


MASKS = masks()


def alone(model, ids, mask, row, positions, **options):
    """Logits of a row's tokens, by themselves."""
    own = mask[row].bool()
    return model(ids[row : row + 1, own], position_ids=positions[row : row + 1, own], **options).logits[0]


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


@pytest.fixture(scope="module")
def model():
    with zz.zigzag(new_model("llama"), PLAN) as model, torch.no_grad():
        yield model


@pytest.mark.parametrize("pieces", [[40], [24, 16], [20, 1, 1, 1, 1, 10, 6]], ids=str)
@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("plan", [PLAN, HEADS], ids=["layers", "heads"])
def test_tokens_come_out_as_without_padding(model, plan, case, pieces):
    """Also where it comes in steps and short forwards on a cache that holds tokens."""
    ids, mask = prompt(WIDTH, 2), MASKS[case]
    positions, cache, found, end = positions_of(mask), zz.ZigzagCache(model.config, plan), [], 0
    for piece in pieces:
        start, end = end, end + piece
        columns = {"input_ids": ids[:, start:end], "position_ids": positions[:, start:end]}
        found.append(model(**columns, attention_mask=mask[:, :end], past_key_values=cache).logits)
        assert cache.seq_lens.tolist() == mask[:, :end].sum(1).tolist()
    found = torch.cat(found, 1)
    assert found.isfinite().all() and cache.get_seq_length() == WIDTH
    for row in range(2):
        expected = alone(model, ids, mask, row, positions, past_key_values=zz.ZigzagCache(model.config, plan))
        torch.testing.assert_close(found[row, mask[row].bool()], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", MASKS)
def test_like_stock_attention_under_dense_masks(model, case):
    """With the positions of columns, which are what a forward without position_ids has, and without a cache."""
    ids, mask = prompt(WIDTH, 2), MASKS[case]
    whole, twin = zz.Plan(["retrieval"] * NUM_LAYERS, sink=0, window=1), tiny_model()
    expected = twin(ids, attention_mask=mask).logits[mask.bool()]
    for options in ({"past_key_values": zz.ZigzagCache(model.config, whole)}, {"use_cache": False}):
        if "use_cache" in options:
            with zz.zigzag(new_model("llama"), whole) as other:
                found = other(ids, attention_mask=mask, **options).logits
        else:
            found = model(ids, attention_mask=mask, **options).logits
        torch.testing.assert_close(found[mask.bool()], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", MASKS)
def test_prompts_in_chunks(case):
    ids, mask = prompt(WIDTH, 2), MASKS[case]
    with torch.no_grad(), zz.zigzag(new_model("llama"), PLAN, prefill_chunk=7) as model:
        cache, one_shot = (zz.ZigzagCache(model.config, PLAN) for _ in range(2))
        options = {"attention_mask": mask, "position_ids": positions_of(mask)}
        model(ids, **options, past_key_values=cache, logits_to_keep=1)
        model(ids, **options, past_key_values=one_shot)
        assert cache.seq_lens.equal(one_shot.seq_lens) and cache.state.tokens.ids[:, :WIDTH].equal(
            one_shot.state.tokens.ids[:, :WIDTH]
        )
        step = {"attention_mask": torch.cat([mask, mask.new_ones(2, 1)], 1), "position_ids": mask.sum(1, keepdim=True)}
        found, expected = (model(prompt(1, 2, seed=5), **step, past_key_values=each).logits for each in (cache, one_shot))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no_cache"])
def test_generate_with_padding_inside_rows(options):
    """The last column has tokens: what generate() goes on from means nothing else, here and with stock attention."""
    ids, mask, stock = prompt(WIDTH, 2), MASKS["inside"], new_model("llama")
    whole = zz.Plan(["retrieval"] * NUM_LAYERS, sink=0, window=1)
    expected = generate(stock, 8, ids, attention_mask=mask, **options)
    with zz.zigzag(new_model("llama"), whole) as model:
        assert generate(model, 8, ids, attention_mask=mask, **options).equal(expected)


def test_a_conversation_goes_on_and_is_taken_back_over_right_padding(model):
    ids, mask = prompt(WIDTH, 2), MASKS["right"]
    cache = zz.ZigzagCache(model.config, PLAN, rollback=20)
    model(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
    whole = torch.cat([ids, prompt(9, 2, seed=8)], 1), torch.cat([mask, mask.new_ones(2, 9)], 1)
    fresh = generate(model, 6, whole[0], attention_mask=whole[1])
    assert generate(model, 6, whole[0], attention_mask=whole[1], past_key_values=cache).equal(fresh)
    cache.crop(WIDTH - 6)
    assert cache.seq_lens.tolist() == [34, 23]  # of the columns taken back, the second row held none of the prompt's
    short = whole[0][:, : WIDTH - 2], whole[1][:, : WIDTH - 2]
    fresh = model(short[0], attention_mask=short[1], position_ids=positions_of(short[1])).logits
    options = {"attention_mask": short[1], "position_ids": positions_of(short[1])[:, -4:], "past_key_values": cache}
    with pytest.raises(ValueError, match="right after crop"):
        model(short[0][:, -4:], **options)
    assert fresh.isfinite().all() and cache.seq_lens.tolist() == [34, 23]


def test_a_row_may_skip_a_step_after_all_was_taken_back(model):
    cache, ids = zz.ZigzagCache(model.config, PLAN, rollback=20), prompt(3, 2, seed=5)
    model(prompt(3, 2), past_key_values=cache)
    cache.crop(-3)
    model(ids[:, :1], past_key_values=cache)
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    for end in (2, 3):
        given = {"attention_mask": mask[:, :end], "position_ids": positions_of(mask[:, :end])[:, -1:]}
        logits = model(ids[:, end - 1 : end], **given, past_key_values=cache).logits
    fresh = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits[:, -1:]
    torch.testing.assert_close(logits, fresh, atol=1e-5, rtol=1e-5)


def test_tokens_that_are_held_cannot_be_hidden(model):
    cache = zz.ZigzagCache(model.config, PLAN)
    ids, mask = prompt(WIDTH, 2), MASKS["random"]
    model(ids, attention_mask=mask, past_key_values=cache)
    for change in (lambda m: m[1].zero_(), lambda m: m[0, int(mask[0].nonzero()[3])].zero_(), lambda m: m[:, :WIDTH].fill_(1)):
        for new in (1, 3, 30):
            wrong = torch.cat([mask, mask.new_ones(2, new)], 1)
            change(wrong[:, :WIDTH])
            with pytest.raises(ValueError, match="masks other tokens than those the cache left out before: start from an empty"):
                model(prompt(new, 2), attention_mask=wrong, past_key_values=cache)
            assert cache.seq_lens.tolist() == mask.sum(1).tolist()
    right = torch.cat([mask, mask.new_ones(2, 1)], 1)
    assert model(prompt(1, 2), attention_mask=right, past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("held", [0, 10])
def test_documents_packed_into_one_row_are_refused(model, held, use_cache):
    packed = torch.cat([torch.arange(20), torch.arange(10)])[None] + held
    options = {"use_cache": False}
    if use_cache:
        options = {"past_key_values": zz.ZigzagCache(model.config, PLAN)}
        model(prompt(10)[:, :held], **options) if held else None
    with pytest.raises(ValueError, match="several documents packed into one do.*give each document a row"):
        model(prompt(30), position_ids=packed, **options)
    if use_cache:
        assert options["past_key_values"].get_seq_length() == held
    gaps = torch.arange(30)[None] * 3 + held  # other positions are the model's affair
    assert model(prompt(30), position_ids=gaps, past_key_values=options.get("past_key_values")).logits.isfinite().all()
