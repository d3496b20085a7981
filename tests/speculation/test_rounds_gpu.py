"""Speculative decoding on a GPU: tokens in bfloat16, captured graphs, and what a round waits for."""

import warnings

import pytest
import torch
from gpu import needs_cuda
from tiny_models import new_model, padded_prompt

import zigzag_ext as zz
from zigzag_ext.hf.session import session_of

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
GAP = 2**-5  # of the two best logits, relative to the best: two steps of bfloat16 between forwards of one and several tokens


@pytest.fixture(scope="module", params=[False, True], ids=["eager", "compiled"])
def model(request):
    with zz.zigzag(new_model("llama").to("cuda", torch.bfloat16), PLAN, max_len=1024, compile=request.param) as model:
        yield model


def given(lengths):
    return {name: value.cuda() for name, value in padded_prompt(lengths).items()}


@needs_cuda
@pytest.mark.parametrize("draft", ["lookup", "streaming", "auto"])
@pytest.mark.parametrize("lengths", [[70], [5, 30, 17, 9, 22]])
def test_every_token_is_the_best_of_a_fresh_forward(model, draft, lengths):
    """Or within the rounding of it: bfloat16 rounds forwards of one and of several tokens differently."""
    inputs, width = given(lengths), max(lengths)
    speculation = zz.speculate(draft, window=24)
    ids = model.generate(**inputs, **GREEDY, max_new_tokens=60, custom_generate=speculation)
    assert speculation.report.tokens == 60 * len(lengths)
    with torch.no_grad():
        for row, length in enumerate(lengths):
            logits = model(ids[row : row + 1, width - length :]).logits[0, length - 1 : -1].float()
            chosen = logits.gather(1, ids[row, width:, None])[:, 0]
            best = logits.max(1).values
            assert (best - chosen <= GAP * best.abs()).all()


@needs_cuda
def test_a_round_waits_once(model):
    """For the one copy of what was accepted; drafts, verification and what is taken back wait for nothing."""
    inputs = given([70, 33])
    waits, rounds = [], []
    for tokens in (40, 80):
        for _ in range(2):  # the first captures
            speculation = zz.speculate("streaming", tokens=3, window=24)
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    model.generate(**inputs, **GREEDY, max_new_tokens=tokens, custom_generate=speculation)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing CUDA operation" in str(each.message) for each in found))
        rounds.append(speculation.report.rounds)
    assert waits[1] - waits[0] == rounds[1] - rounds[0] > 5


@needs_cuda
@pytest.mark.parametrize("model", [True], ids=["compiled"], indirect=True)
def test_at_most_five_graphs_per_batch_size(model):
    """A step, forwards of 4, 8 and 16 tokens, and a step of the draft."""
    session = session_of(model)
    inputs = given([40, 12, 26])
    cache = session.new_cache(rollback=15)
    options = GREEDY | {"max_new_tokens": 60, session.cache_name: cache}
    for draft, tokens in (("off", 1), ("streaming", 3), ("streaming", 7), ("streaming", 15), ("lookup", 15)):
        cache.reset()
        model.generate(**inputs, **options, custom_generate=zz.speculate(draft, tokens=tokens, window=24))
    steps = session.compiled.steps[cache.addresses].values()
    assert 3 <= len(steps) <= 5 and all(step.graph is not None for step in steps)
