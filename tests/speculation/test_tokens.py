"""Greedy speculative decoding emits the tokens of plain generate()."""

import pytest
import torch
from tiny_models import new_model, padded_prompt, prompt, tiny_model, windowed_model
from transformers import StoppingCriteria, StoppingCriteriaList

import zigzag_ext as zz
from zigzag_ext.hf.cache_argument import cache_argument

SINK, WINDOW = 4, 16
KINDS = ["streaming", "retrieval"] * 2
PLAN = zz.Plan(KINDS, sink=SINK, window=WINDOW)
PLANS = {
    "layers": PLAN,
    "heads": zz.Plan([("retrieval", "streaming"), "streaming", "retrieval", "streaming"], sink=SINK, window=WINDOW),
    "retrieval": zz.Plan(["retrieval"] * 4, sink=0, window=1),
    "streaming": zz.Plan(["streaming"] * 4, sink=SINK, window=WINDOW),
    "fp8": zz.Plan(KINDS, sink=SINK, window=WINDOW, kv_format="fp8", ring_kv_format="fp8"),
    "int8": zz.Plan(KINDS, sink=SINK, window=WINDOW, kv_format="int8", ring_kv_format="int8", key_smoothing=True),
    "int4": zz.Plan(KINDS, sink=SINK, window=WINDOW, kv_format="int8/int4"),
}
LENGTHS = [5, 30, 17, 9, 22]
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
TIE = 1e-4  # logits closer than this may change places between forwards of one and of several tokens


def inputs(batch):
    if batch == 1:
        ids = prompt(6).repeat(1, 6)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return padded_prompt(LENGTHS)


def check_same_tokens(model, given, expected, found) -> int:
    """Rows are equal up to where the two best logits of a fresh forward are within TIE. Returns the number of such rows."""
    assert found.shape == expected.shape
    ties = 0
    for row in (found != expected).any(1).nonzero().flatten().tolist():
        end = int((found[row] != expected[row]).nonzero()[0])
        first = int((given["attention_mask"][row] == 0).sum())
        best = model(expected[row : row + 1, first:end]).logits[0, -1].topk(2).values
        assert best[0] - best[1] < TIE, f"row {row} differs at {end}: {found[row, end]} instead of {expected[row, end]}"
        ties += 1
    return ties


def speculate(model, given, speculation, **options):
    options = GREEDY | {"max_new_tokens": 40} | options
    expected = model.generate(**given, **options)
    found = model.generate(**given, **options, custom_generate=speculation)
    return check_same_tokens(model, given, expected, found)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("draft", ["lookup", "streaming", "auto", "off"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt_neox"])
def test_families(family, draft, batch):
    with zz.zigzag(tiny_model(family), PLAN) as model:
        speculation = zz.speculate(draft=draft, window=24)
        assert speculate(model, inputs(batch), speculation) == 0
        assert speculation.report.tokens == 40 * batch


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("draft", ["lookup", "streaming"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])  # with a soft cap; with learned sinks
def test_native_windows(family, draft, batch):
    with zz.zigzag(windowed_model(family, 8)) as model:
        speculation = zz.speculate(draft=draft, window=24)
        assert speculate(model, inputs(batch), speculation) == 0
        assert speculation.report.rounds < 40


@pytest.mark.parametrize("draft", ["lookup", "streaming"])
@pytest.mark.parametrize("plan", PLANS)
def test_plans_and_formats(plan, draft, force_drafts):
    """Codes of a draft that is taken back leave nothing behind: quantised caches emit the same tokens, too."""
    with zz.zigzag(tiny_model(), PLANS[plan]) as model:
        given = inputs(5)
        if draft == "lookup":
            expected = model.generate(**given, **GREEDY, max_new_tokens=40)[:, given["input_ids"].shape[1] :]
            force_drafts(expected, right=3)
        speculation = zz.speculate(draft=draft, tokens=5, window=24)
        assert speculate(model, given, speculation) <= 1
        kept, drafted = speculation.report.accepted[draft], speculation.report.drafted[draft]
        if draft == "streaming" and plan in ("retrieval", "streaming"):  # a context that fits; a target that streams itself
            assert kept == drafted > 0
        else:
            assert 0 < kept < drafted


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("right", [0, 1, 4, 7])
def test_forced_drafts(right, batch, force_drafts):
    """All right, all wrong, right up to j: as many rounds as that takes."""
    with zz.zigzag(tiny_model(), PLAN) as model:
        given = inputs(batch)
        expected = model.generate(**given, **GREEDY, max_new_tokens=41)[:, given["input_ids"].shape[1] :]
        force_drafts(expected, right)
        speculation = zz.speculate(draft="lookup")
        assert speculate(model, given, speculation, max_new_tokens=41) == 0
        report = speculation.report
        assert report.rounds == -(-40 // (right + 1)) and report.accepted["lookup"] == (41 - 1 - report.rounds) * batch
        assert report.tokens_per_round == pytest.approx(40 / report.rounds)


OPTIONS = {
    "repetition_penalty": {"repetition_penalty": 1.5},
    "min_new_tokens": {"min_new_tokens": 25, "eos_token_id": list(range(3, 60))},
    "eos": {"eos_token_id": list(range(3, 40))},
    "no_repeat": {"no_repeat_ngram_size": 2, "forced_eos_token_id": 7, "eos_token_id": 7},
    "bad_words": {"bad_words_ids": [[5], [9, 11]], "suppress_tokens": [30, 31], "begin_suppress_tokens": [40]},
    "decay": {"exponential_decay_length_penalty": (5, 1.5), "eos_token_id": 9},
}


@pytest.mark.parametrize("draft", ["lookup", "streaming"])
@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("option", OPTIONS)
def test_processors_and_ends_are_those_of_generate(option, batch, draft, force_drafts):
    """Logits processors see every position with the tokens before it, and an eos inside a draft ends the row."""
    with zz.zigzag(tiny_model(), PLAN) as model:
        given = inputs(batch)
        if draft == "lookup":
            expected = model.generate(**given, **GREEDY | OPTIONS[option], max_new_tokens=40)
            force_drafts(expected[:, given["input_ids"].shape[1] :], right=5)
        assert speculate(model, given, zz.speculate(draft=draft, window=24), **OPTIONS[option]) == 0


class EndsIn(StoppingCriteria):
    """Each row by itself, as generate() asks for: its last token is one of these."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, ids, scores, **kwargs):
        return torch.tensor([token in self.tokens for token in ids[:, -1].tolist()])


@pytest.mark.parametrize("eos", [None, 7])
@pytest.mark.parametrize("right", [0, 7])
def test_stopping_criteria_judge_each_position(eos, right, force_drafts):
    """Without an eos token generate() goes on in rows that have stopped, until all have."""
    with zz.zigzag(tiny_model(), PLAN) as model:
        given = inputs(5)
        options = {"stopping_criteria": StoppingCriteriaList([EndsIn(range(3, 30))]), "eos_token_id": eos, "max_new_tokens": 60}
        expected = model.generate(**given, **GREEDY | options)[:, 30:]
        assert expected.shape[1] < 60
        force_drafts(expected, right)
        assert speculate(model, given, zz.speculate(draft="lookup"), **options) == 0


@pytest.mark.parametrize("draft", ["lookup", "streaming"])
@pytest.mark.parametrize("batch", [1, 5])
def test_three_turns_on_one_cache(batch, draft):
    """Each turn goes on where the cache stopped, with the tokens that plain turns give; nothing is read twice."""
    with zz.zigzag(tiny_model(), PLAN) as model:
        ids, mask = inputs(batch)["input_ids"], inputs(batch)["attention_mask"]
        plain, own = (zz.ZigzagCache(model.config, PLAN, rollback=7) for _ in range(2))
        for turn in range(3):
            options = GREEDY | {"max_new_tokens": 12, "attention_mask": mask}
            expected = model.generate(ids, **options, **cache_argument(model, plain))
            speculation = zz.speculate(draft=draft, window=24)
            found = model.generate(ids, **options, custom_generate=speculation, **cache_argument(model, own))
            assert found.equal(expected) and own.get_seq_length() == plain.get_seq_length() == found.shape[1] - 1
            assert own.seq_lens.equal(plain.seq_lens)
            ids = torch.cat([found, prompt(6, batch, seed=turn)], 1)
            mask = torch.cat([mask, torch.ones(batch, ids.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)


def test_rows_that_ended_go_on_in_the_next_turn():
    """A row that ended early has left the columns behind it out: the mask has zeros at its padding, as generate() infers."""
    with zz.zigzag(tiny_model(), PLAN) as model:
        given, cache = inputs(5), zz.ZigzagCache(model.config, PLAN, rollback=7)
        options = GREEDY | {"eos_token_id": list(range(3, 40)), "max_new_tokens": 30}
        first = model.generate(
            **given, **options, custom_generate=zz.speculate(draft="streaming", window=24), **cache_argument(model, cache)
        )
        ids = torch.cat([first, prompt(5, 5, seed=8)], 1)
        mask = (ids != 0).long()
        assert (mask[:, 30:] == 0).any()
        alone = [ids[row : row + 1, mask[row].bool()] for row in range(5)]
        found = model.generate(
            ids, attention_mask=mask, **GREEDY, max_new_tokens=10,
            custom_generate=zz.speculate(draft="streaming", window=24), **cache_argument(model, cache),
        )[:, ids.shape[1] :]  # fmt: skip
        for row, text in enumerate(alone):
            expected = model.generate(text, attention_mask=torch.ones_like(text), **GREEDY, max_new_tokens=10)
            assert found[row].equal(expected[0, text.shape[1] :])


def test_a_tight_max_len_is_enough():
    """Drafts ask for no more room than plain decoding does."""
    with zz.zigzag(tiny_model(), PLAN, max_len=30 + 40 - 1) as model:
        for draft in ("streaming", "lookup"):
            assert speculate(model, inputs(5), zz.speculate(draft=draft, window=24)) == 0


@pytest.mark.parametrize("max_len", [None, 69, 1088, 1089])
def test_a_window_that_is_longer_than_the_cache(max_len):
    """Is one that shows all of it: drafts are what the target says where only retrieval layers are there."""
    plan = PLANS["retrieval"]
    with zz.zigzag(tiny_model(), plan, max_len=max_len) as model:
        speculation = zz.speculate("streaming")
        assert speculate(model, inputs(5), speculation) == 0
        assert speculation.report.acceptance("streaming") == 1


@pytest.mark.parametrize("draft,window", [("streaming", 24), ("streaming", 1024), ("lookup", 24)])
def test_compressed_prompts(draft, window):
    """A compressed layer is read through a window of the tokens that it holds, which is a draft like any other."""
    with zz.zigzag(tiny_model(), PLAN, compress=zz.PromptWindows(budget=60, window=4, observe=8)) as model:
        given, options = padded_prompt([200, 90, 150]), GREEDY | {"max_new_tokens": 30}
        expected = model.generate(**given, **options)
        found = model.generate(**given, **options, custom_generate=zz.speculate(draft, window=window))
        assert found.equal(expected)


def test_prompts_as_embeddings():
    with zz.zigzag(new_model("llama"), PLAN) as model:
        given = inputs(5)
        embeds = model.get_input_embeddings()(given["input_ids"])
        options = GREEDY | {"inputs_embeds": embeds, "attention_mask": given["attention_mask"], "max_new_tokens": 20}
        expected = model.generate(**options)
        assert model.generate(**options, custom_generate=zz.speculate(draft="streaming", window=24)).equal(expected)
