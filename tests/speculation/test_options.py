"""Options, refusals, the report, the streamer, and what generate() returns."""

import copy

import pytest
import torch
from tiny_models import new_model, padded_prompt, prompt, tiny_model
from transformers import DynamicCache, LogitsProcessorList

import zigzag_ext as zz
from zigzag_ext.hf.cache_argument import cache_argument

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 20}


@pytest.fixture(scope="module")
def model():
    with zz.zigzag(tiny_model(), PLAN) as model:
        yield model


@pytest.mark.parametrize(
    "options,error,message",
    [
        ({"draft": "eagle"}, ValueError, "auto, lookup, streaming, off; got 'eagle'"),
        ({"tokens": 0}, ValueError, "tokens must be 1 to 15, got 0"),
        ({"tokens": 16}, ValueError, "tokens must be 1 to 15, got 16"),
        ({"tokens": 3.5}, TypeError, "tokens must be an integer"),
        ({"window": 0}, ValueError, "window must be 1 to"),
        ({"min_match": 0}, ValueError, "min_match must be 1 to 64"),
    ],
)
def test_options_are_checked_where_they_are_given(options, error, message):
    with pytest.raises(error, match=message):
        zz.speculate(**options)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"prefill_chunk_size": 8}, "prefill_chunk_size=8"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"use_cache": False}, "KV cache"),
        ({"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
    ],
)
def test_what_needs_another_loop_is_refused_by_name(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.generate(prompt(9), **GREEDY | options, custom_generate=zz.speculate(draft="lookup"))


def test_models_and_caches_that_do_not_fit(model):
    with pytest.raises(RuntimeError, match="call zigzag_ext.enable"):
        new_model("llama").generate(prompt(9), **GREEDY, custom_generate=zz.speculate())
    cache = zz.ZigzagCache(model.config, PLAN, rollback=3)
    with pytest.raises(ValueError, match="tokens=7 .*can take back 3: make it with rollback=7"):
        model.generate(prompt(9), **GREEDY, custom_generate=zz.speculate(), **cache_argument(model, cache))
    assert cache.get_seq_length() == 0
    for name, given in {"streamer": Collected(), "assistant_model": new_model("llama")}.items():
        with pytest.raises(ValueError, match=f"{name} to custom_generate"):
            model.generate(prompt(9), **GREEDY, custom_generate=zz.speculate(), **{name: given})
    with pytest.raises(TypeError, match="got a DynamicCache"):
        model.generate(prompt(9), **GREEDY, custom_generate=zz.speculate(), **cache_argument(model, DynamicCache()))


def test_the_report(model, force_drafts):
    given = padded_prompt([9, 20])
    expected = model.generate(**given, **GREEDY)[:, 20:]
    force_drafts(expected, right=2)
    speculation = zz.speculate(draft="lookup", tokens=4)
    output = model.generate(**given, **GREEDY, custom_generate=speculation, return_dict_in_generate=True)
    report = output.report
    assert report is speculation.report and output.sequences[:, 20:].equal(expected)
    assert (report.tokens, report.rounds, report.row_rounds) == (40, 7, 14)
    assert report.accepted == {"lookup": 24, "streaming": 0} and report.kind_rounds.keys() == {"lookup", "plain"}
    assert report.tokens_per_round == pytest.approx(38 / 14)
    assert report.prompt_ms > 0 and report.rounds_ms >= sum(report.kind_ms.values()) * 0.99
    assert "lookup: 24 of" in str(report) and "MB of weights" in str(report)
    cache = next(getattr(output, name) for name in ("cache", "past_key_values") if name in output)
    assert isinstance(cache, zz.ZigzagCache) and cache.get_seq_length() == 39


class Collected:
    def __init__(self):
        self.columns, self.ended = [], False

    def put(self, value):
        self.columns.append(value.clone())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("eos", [None, list(range(3, 40))])
def test_a_streamer_gets_what_plain_decoding_gives_it(model, eos, force_drafts):
    given, options = padded_prompt([9, 20, 4]), GREEDY | {"eos_token_id": eos}
    plain, own = Collected(), Collected()
    expected = model.generate(**given, **options, streamer=plain)
    force_drafts(expected[:, 20:], right=3)
    found = model.generate(**given, **options, custom_generate=zz.speculate(draft="lookup", streamer=own))
    assert found.equal(expected) and own.ended
    assert torch.cat([column.reshape(3, -1) for column in own.columns], 1).equal(expected)
    assert len(own.columns) == len(plain.columns)


def test_caches_of_generate_can_take_drafts_back(model):
    """enable() need not know: a call of its own makes a cache with the slots that its drafts need."""
    output = model.generate(prompt(9), **GREEDY, custom_generate=zz.speculate(tokens=5), return_dict_in_generate=True)
    cache = next(getattr(output, name) for name in ("cache", "past_key_values") if name in output)
    assert cache.rollback == 5
    off = model.generate(prompt(9), **GREEDY, custom_generate=zz.speculate(draft="off"), return_dict_in_generate=True)
    assert off.report.rounds == 19 and off.report.acceptance() == 0


def test_a_copied_model_speculates_too(model):
    ids = prompt(20)
    expected = model.generate(ids, **GREEDY)
    assert copy.deepcopy(model).generate(ids, **GREEDY, custom_generate=zz.speculate(draft="streaming", window=8)).equal(expected)


def test_several_returned_sequences(model):
    torch.manual_seed(0)
    options = GREEDY | {"do_sample": True, "num_return_sequences": 3}
    ids = model.generate(prompt(9), **options, custom_generate=zz.speculate(draft="streaming", window=8))
    assert ids.shape == (3, 29) and not ids[0].equal(ids[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["processor", "streamer"])
def test_a_call_that_fails_leaves_a_cache_that_goes_on(model, place, error, force_drafts):
    """Whatever was drafted is taken back: the same conversation goes on from there with the tokens of plain decoding."""
    given, cache = padded_prompt([9, 20]), zz.ZigzagCache(model.config, PLAN, rollback=7)
    expected = model.generate(**given, **GREEDY)
    force_drafts(expected[:, 20:], right=2)

    class FailsLater:
        calls = 0

        def __call__(self, ids, scores):
            FailsLater.calls += place == "processor"
            if FailsLater.calls == 12:
                raise error("stop")
            return scores

        def put(self, value):
            FailsLater.calls += 1
            if FailsLater.calls == 12:
                raise error("stop")

        def end(self):
            raise AssertionError("the call failed")

    options = GREEDY | cache_argument(model, cache)
    streamer = FailsLater() if place == "streamer" else None
    speculation = zz.speculate("lookup", streamer=streamer)
    with pytest.raises(error, match="stop"):
        model.generate(**given, **options, custom_generate=speculation, logits_processor=LogitsProcessorList([FailsLater()]))
    held = cache.get_seq_length()
    assert 20 < held < 39 and cache.state.rows.ends.tolist() == [held, held]
    assert cache.state.tokens.ids[:, 20:held].equal(expected[:, 20:held].int())
    mask = torch.cat([given["attention_mask"], torch.ones(2, held + 1 - 20, dtype=torch.long)], 1)
    rest = options | {"max_new_tokens": 39 - held}
    assert model.generate(expected[:, : held + 1], attention_mask=mask, **rest).equal(expected)
