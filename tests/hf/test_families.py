"""Every family gives the tokens of stock transformers: an all-retrieval plan those of sdpa, a mixed plan those of dense masks."""

import pytest
from dense_oracle import dense_oracle
from tiny_models import FAMILIES, NUM_LAYERS, generate, padded_prompt, prompt, tiny_model

import zigzag_ext as zz

SINK, WINDOW = 4, 16
MIXED = ["streaming", "retrieval", "streaming", "streaming"]
PLAN = zz.Plan(MIXED, sink=SINK, window=WINDOW)
every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_all_retrieval_plan_equals_sdpa(family):
    model, ids = tiny_model(family), prompt(101)
    expected = generate(model, 24, ids)
    with zz.zigzag(model, zz.Plan(["retrieval"] * NUM_LAYERS, sink=SINK, window=WINDOW)):
        assert generate(model, 24, ids).equal(expected)


@every_family
def test_mixed_plan_equals_dense_masks_in_every_chunking(family):
    model, ids = tiny_model(family), prompt(101)
    full = generate(model, 24, ids)
    with dense_oracle(model, MIXED, SINK, WINDOW):
        expected = generate(model, 24, ids)
    assert not expected.equal(full), "this prompt cannot tell the plan from full attention"
    with zz.zigzag(model, PLAN):
        assert generate(model, 24, ids).equal(expected)
        for chunk in (7, 37):
            assert generate(model, 24, ids, prefill_chunk_size=chunk).equal(expected), f"chunks of {chunk}"


@every_family
def test_left_padded_batch_equals_dense_masks_after_five_windows(family):
    model, batch = tiny_model(family), padded_prompt([61, 40, 3])
    with dense_oracle(model, MIXED, SINK, WINDOW):
        expected = generate(model, 5 * WINDOW + 5, **batch)
    with zz.zigzag(model, PLAN):
        assert generate(model, 5 * WINDOW + 5, **batch).equal(expected)
