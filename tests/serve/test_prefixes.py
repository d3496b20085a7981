"""A prompt that begins as an earlier one goes on from there, with the tokens of one that is read from its first token on."""

import pytest
import torch
from driving import GAPS, near_ties
from gpu import needs_cuda
from prefix_cases import (  # noqa: F401  the fixture
    EVERY,
    GIVEN,
    MIXED,
    NEW,
    PAGE,
    RETRIEVAL,
    SINK,
    SMOOTHED,
    TEXT,
    WINDOW,
    cold,
    marks_are_near,
    model_of,
    plan_of,
    reached,
    run,
    sharing,
)
from tiny_models import SHARED, new_model, shared_model, windowed_model

import zigzag_ext as zz
from zigzag_ext.serve import prefixes

BORDERS = [
    *(1, SINK - 1, SINK, SINK + 1),
    *(WINDOW - 1, WINDOW, WINDOW + 1, SINK + WINDOW - 1, SINK + WINDOW, SINK + WINDOW + 1),
    *(EVERY - 2, EVERY - 1, EVERY, EVERY + 1, 2 * EVERY - 2, 2 * EVERY - 1, 2 * EVERY, 2 * EVERY + 1),
    *(3 * PAGE - 1, 5 * PAGE - 1, 5 * PAGE, 5 * PAGE + 1, 48, 2 * (SINK + WINDOW) + 1),  # pages, chunks, the ring's second round
    *(GIVEN - 2, GIVEN - 1, GIVEN, GIVEN + 1, GIVEN + NEW - 3, GIVEN + NEW - 2, GIVEN + NEW - 1, GIVEN + NEW),
]


@pytest.mark.parametrize("rows", [3, 1], ids=["copied", "taken over"])
@pytest.mark.parametrize("kv_format", GAPS)
def test_a_hit_equals_cold_at_every_border(kv_format, rows, watched, record_property):
    """With one row, what is kept is taken over; with several it is copied, unless all of it is used."""
    ties, borders = 0, BORDERS if (kv_format, rows) == ("none", 3) else BORDERS[1::6] + BORDERS[-2:]
    with sharing(plan_of(kv_format=kv_format, ring_kv_format=kv_format), max_rows=rows) as driver:
        first = run(driver, TEXT[:GIVEN])
        whole, places = TEXT[:GIVEN] + first.token_ids, (EVERY, 2 * EVERY, GIVEN, GIVEN + NEW - 1)
        for common in borders:
            ids = whole[:common] + TEXT[100:105]
            wanted = cold(driver, watched, ids)
            assert run(driver, TEXT[:GIVEN]).token_ids == first.token_ids
            done = run(driver, ids)
            assert done.cached_tokens == reached(places, common), common
            ties += near_ties(done.token_ids, wanted, GAPS[kv_format])
        driver.drain()
    record_property("count of hits that differ from cold at a near tie", ties)
    assert ties <= len(borders) // 8


@pytest.mark.parametrize("rows", [2, 3], ids=["taken over", "copied"])
def test_rings_go_back_by_one_token_and_not_again(rows, watched):
    """Of prompts that come together, the second must not go back from where the first one has gone back to."""
    with sharing(max_rows=rows) as driver:
        whole = TEXT[:GIVEN] + run(driver, TEXT[:GIVEN]).token_ids
        prompts = [whole[: GIVEN + NEW - 2] + TEXT[100:105], whole[: GIVEN + NEW - 3] + TEXT[110:115]]
        wanted = [cold(driver, watched, ids) for ids in prompts]
        run(driver, TEXT[:GIVEN])
        requests = [driver.submit(ids, zz.Sampling(NEW, ignore_eos=True)) for ids in prompts]
        driver.finish()
        assert [request.cached_tokens for request in requests] == [GIVEN + NEW - 2, GIVEN]
        for request, choices in zip(requests, wanted, strict=True):
            assert not near_ties(request.result(0).token_ids, choices, GAPS["none"])
        driver.drain()


@pytest.mark.parametrize("length", [2, SINK, SINK + WINDOW, SINK + WINDOW + 1, EVERY, 50])
def test_a_prompt_that_comes_again_reads_its_last_token(length, watched):
    with sharing() as driver:
        wanted = cold(driver, watched, TEXT[:length])
        for cached in (0, length - 1, length - 1):
            done = run(driver, TEXT[:length])
            assert done.cached_tokens == cached and not near_ties(done.token_ids, wanted, GAPS["none"])
        driver.drain()


@pytest.mark.parametrize("plan", [RETRIEVAL, MIXED, SMOOTHED], ids=["retrieval", "mixed", "smoothed"])
def test_plans_of_every_kind(plan, watched):
    """Where all layers retrieve, a prompt goes on from any token."""
    gap = GAPS[plan.kv_format.k]
    with sharing(plan) as driver:
        whole = TEXT[:GIVEN] + run(driver, TEXT[:GIVEN]).token_ids
        for common in (23, 55, GIVEN, GIVEN + NEW - 1):
            ids = whole[:common] + TEXT[100:130]
            wanted = cold(driver, watched, ids)
            run(driver, TEXT[:GIVEN])
            done = run(driver, ids)
            assert done.cached_tokens == (common if plan is RETRIEVAL else reached((EVERY, 64, GIVEN, GIVEN + NEW - 1), common))
            near_ties(done.token_ids, wanted, gap)
        driver.drain()


KINDS = {
    "positions of its own": (new_model, "gpt2", {}),
    "windows and soft caps": (windowed_model, "gemma2", {"window": 16}),
    "learned sinks": (windowed_model, "gpt_oss", {"window": 16}),
    **{f"shared caches of {family}": (shared_model, family, {"window": 16}) for family in SHARED},
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_every_kind(kind, watched):
    """As they are: rings are those of their own windows."""
    make, family, options = KINDS[kind]
    with sharing(None, make(family, **options)) as driver:
        whole = TEXT[:GIVEN] + run(driver, TEXT[:GIVEN]).token_ids
        for common in (40, GIVEN, GIVEN + NEW - 1):
            ids = whole[:common] + TEXT[100:120]
            wanted = cold(driver, watched, ids)
            run(driver, TEXT[:GIVEN])
            done = run(driver, ids)
            rings = driver.slots.ring_bytes > 0
            assert done.cached_tokens == (reached((EVERY, 64, GIVEN, GIVEN + NEW - 1), common, 16) if rings else common)
            assert not near_ties(done.token_ids, wanted, GAPS["none"])
        driver.drain()


def test_smoothed_keys_are_shared_where_their_offset_is_the_same():
    """It is the mean of the first tokens of a prompt, 24 in a chunk here: those of shorter prompts are others."""
    with sharing(SMOOTHED) as driver:
        run(driver, TEXT[:23])
        assert run(driver, TEXT[:60]).cached_tokens == 0  # a short one gives nothing
        assert run(driver, TEXT[:22]).cached_tokens == 0  # and takes nothing
        assert run(driver, TEXT[:70]).cached_tokens == 60
        driver.drain()


@pytest.mark.parametrize("state", ["between chunks", "decoding", "cancelled while it was read", "cancelled while it answered"])
def test_requests_that_run_and_that_were_cancelled_give_what_they_have(state, watched):
    with sharing() as driver:
        ids = TEXT[:80] + TEXT[200:210]
        wanted = cold(driver, watched, ids)
        giver = driver.submit(TEXT[:150], zz.Sampling(20, ignore_eos=True))
        if "answer" in state or state == "decoding":
            driver.until(lambda: len(giver.tokens) == 3)
        else:
            driver.until(lambda: giver.job.read == 56)
        if "cancelled" in state:
            giver.cancel()
            driver.step()
            assert giver.state == "cancelled"
        done = run(driver, ids)
        assert done.cached_tokens == (56 if state in ("between chunks", "cancelled while it was read") else 2 * EVERY)
        assert not near_ties(done.token_ids, wanted, GAPS["none"])
        driver.drain()


def test_a_row_that_was_copied_may_end_at_once(watched):
    """The one that gives is cancelled in the step in which another has taken its beginning, and the other way round."""
    for number in (0, 1):
        with sharing() as driver:
            ids = [TEXT[:150], TEXT[:80] + TEXT[200:210]]
            wanted = [cold(driver, watched, each, 20) for each in ids]
            requests = [driver.submit(ids[0], zz.Sampling(20, ignore_eos=True))]
            driver.until(lambda: len(requests[0].tokens) == 3)  # noqa: B023
            requests.append(driver.submit(ids[1], zz.Sampling(20, ignore_eos=True)))
            driver.until(lambda: requests[1].job.read)  # noqa: B023
            assert requests[1].cached_tokens == 2 * EVERY and requests[1].state == "prefilling"
            requests[number].cancel()
            driver.step()
            assert requests[number].state == "cancelled"
            driver.finish()
            assert not near_ties(requests[1 - number].result(0).token_ids, wanted[1 - number], GAPS["none"])
            driver.drain()


def test_requests_that_come_together_read_what_they_share_once(watched):
    prompts = [TEXT[:200] + TEXT[210 + i : 220 + i] for i in range(3)]
    with sharing(least=prefixes.LEAST) as driver:
        wanted = [cold(driver, watched, ids) for ids in prompts]
        before = driver.engine.stats()
        requests = [driver.submit(ids, zz.Sampling(NEW, ignore_eos=True)) for ids in prompts]
        driver.finish()
        stats = driver.engine.stats()
        read, cached = (stats[name] - before[name] for name in ("prompt_tokens", "cached_tokens"))
        assert read + cached == 630 and read < 1.4 * 210 and cached == sum(each.result(0).cached_tokens for each in requests)
        for request, choices in zip(requests, wanted, strict=True):
            assert not near_ties(request.result(0).token_ids, choices, GAPS["none"])
        driver.drain()


def test_the_place_where_two_prompts_part_serves_the_third(watched, monkeypatch):
    """As that behind the instructions with which a service begins all of its prompts."""
    monkeypatch.setattr(prefixes, "BRANCH", 10)
    prompts = [TEXT[:45] + TEXT[100 + 20 * i : 110 + 20 * i] for i in range(4)]
    with sharing() as driver:
        wanted = [cold(driver, watched, ids) for ids in prompts]
        done = [run(driver, ids) for ids in prompts]
        assert [each.cached_tokens for each in done] == [0, EVERY, 45, 45]
        assert not any(near_ties(each.token_ids, choices, GAPS["none"]) for each, choices in zip(done, wanted, strict=True))
        driver.drain()
    monkeypatch.setattr(prefixes, "BRANCH", 14)
    with sharing() as driver:
        assert [run(driver, ids).cached_tokens for ids in prompts] == [0, EVERY, EVERY, EVERY]
        driver.drain()


def test_nothing_is_shared_across_salts_weights_and_adapters():
    model = model_of()
    with sharing(model=model) as driver:
        run(driver, TEXT[:GIVEN])
        assert run(driver, TEXT[:GIVEN], salt="a").cached_tokens == 0
        assert run(driver, TEXT[:GIVEN], salt="a").cached_tokens == GIVEN - 1
        assert run(driver, TEXT[:GIVEN]).cached_tokens == GIVEN - 1
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        assert run(driver, TEXT[:GIVEN]).cached_tokens == 0
        assert run(driver, TEXT[:GIVEN]).cached_tokens == GIVEN - 1
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        assert run(driver, TEXT[:GIVEN]).cached_tokens == 0
        with pytest.raises(TypeError, match="salt must be a string or None, got 5"):
            driver.submit(TEXT[:5], zz.Sampling(1), salt=5)
        driver.drain()


def test_nothing_is_shared_across_adapters():
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model_of(), lora).eval()
    model.add_adapter("other", lora)
    with sharing(model=model) as driver:
        for switch in (lambda: None, lambda: model.set_adapter("other"), model.merge_adapter, model.unmerge_adapter):
            switch()
            assert [run(driver, TEXT[:GIVEN]).cached_tokens for _ in range(2)] == [0, GIVEN - 1]
        with model.disable_adapter():
            assert run(driver, TEXT[:GIVEN]).cached_tokens == 0
        driver.drain()


@needs_cuda
@pytest.mark.parametrize("kv_format", ["none", "int8"])
def test_a_hit_equals_cold_on_a_gpu(kv_format, watched):
    """By device copies of rows and rings, copied and taken over."""
    model = model_of().to("cuda", torch.bfloat16)
    with sharing(plan_of(kv_format=kv_format, ring_kv_format=kv_format), model) as driver:
        whole = TEXT[:GIVEN] + run(driver, TEXT[:GIVEN]).token_ids
        for common in (20, 31, 50, GIVEN - 1, GIVEN, GIVEN + NEW - 1):
            ids = whole[:common] + TEXT[100:105]
            wanted = cold(driver, watched, ids)
            run(driver, TEXT[:GIVEN])
            done = run(driver, ids)
            assert done.cached_tokens >= reached((EVERY, 2 * EVERY, GIVEN), common)
            near_ties(done.token_ids, wanted, 0.25)
        driver.drain()
