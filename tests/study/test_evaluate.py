"""Evaluation: samples are what they claim, one prefill says what greedy decoding would answer, rows and intervals are right."""

import math
import random

import pytest
import torch

import zigzag_ext as zz
from zigzag_ext.cache.compression import METHODS
from zigzag_ext.study import evaluate
from zigzag_ext.study.evaluate import TASKS
from zigzag_ext.study.evaluate import results as rows
from zigzag_ext.study.evaluate.haystack import Sample, encode, hide, python_reference
from zigzag_ext.study.evaluate.multikey import FILLER
from zigzag_ext.study.evaluate.scoring import Verdict, attention_of, score

from .conftest import KV_HEADS, LAYERS

FILLER_LENGTH = len(FILLER)  # a needle stands between two repetitions
PLAN = zz.Plan(["streaming", "retrieval", "streaming"], sink=4, window=32)
PLANS = [None, PLAN, zz.Plan.from_heads([[True, False], [False, False], [True, True]], sink=4, window=32)]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [700, 701, 1500])
def test_samples_have_the_length_and_the_answer_asked_for(tokenizer, name, length):
    for sample in TASKS[name].samples(tokenizer, length, [0.0, 0.4, 1.0], 3):
        assert len(sample.ids) == length
        for answer, needle in zip(sample.answers, sample.needles, strict=False):
            said, told = sample.ids[answer[0] : answer[-1] + 1], sample.ids[slice(*needle)]
            assert any(told[start : start + len(said)] == said for start in range(len(told)))
            assert tokenizer.decode(sample.ids[answer[0] - 1]) == " "  # the blank is fed, not asked for
            text = tokenizer.decode(said).replace(" ", "")
            assert text.isalpha() if name == "quotation" else len(answer) == len(text) == 5 and text.isdigit()


@pytest.mark.parametrize("name", TASKS)
def test_prompts_end_where_answers_begin(tokenizer, name):
    for sample in TASKS[name].samples(tokenizer, 800, [0.3], 3):
        behind = tokenizer.decode(sample.ids[sample.prompt :])
        assert behind.count("?") == (name == "second_question") or name == "perplexity"
        if name not in ("second_question", "perplexity"):
            assert sample.prompt == min(sample.targets) - 1  # the blank


@pytest.mark.parametrize("name", ["passkey", "multivalue"])
def test_the_first_needle_stands_at_its_depth(tokenizer, name):
    starts = [sample.needles[0][0] for sample in TASKS[name].samples(tokenizer, 1500, [0.0, 0.3, 0.6, 1.0], 1)]
    room = starts[-1] - starts[0]
    assert room > 1000
    for start, depth in zip(starts, [0.0, 0.3, 0.6, 1.0], strict=True):
        assert abs(start - starts[0] - depth * room) <= FILLER_LENGTH / 2


def test_the_text_is_long_enough_for_every_context(tokenizer):
    assert len(python_reference()) > 300_000
    sample = evaluate.perplexity.samples(tokenizer, 1500, [None], 1)[0]
    assert tokenizer.decode(sample.ids)[:200].replace(" ", "")[:50]
    assert sample.targets == list(range(1500 - 512, 1500))


@pytest.mark.parametrize("name", TASKS)
def test_samples_depend_on_their_own_number_only(tokenizer, name):
    task = TASKS[name]
    many = task.samples(tokenizer, 800, [0.5], 6)
    assert many[2:4] == task.samples(tokenizer, 800, [0.5], 2, start=2)
    assert len({sample.ids for sample in many}) == 6
    assert task.samples(tokenizer, 800, [0.5], 6, seed=1) != many


def test_needles_stand_in_order_and_lengths_are_exact():
    class Words:
        def __call__(self, text, **options):
            return {"input_ids": text.split()}

    sample = hide(Words(), 30, "task", list("abc"), [(0.9, "late"), (0.1, "early one")], [("why", False), ("so", True)])
    assert len(sample.ids) == 30 and sample.ids[0] == "task" and sample.ids[-2:] == ("why", "so") and sample.targets == [29]
    (late, _), (early, end) = sample.needles
    assert sample.ids[late] == "late" and sample.ids[early:end] == ("early", "one") and early < late
    assert "".join(sample.ids[early - 3 : early]) in ("abc", "skabc", "kabc") and sample.ids[end] == "a"
    with pytest.raises(ValueError, match="at least 6 tokens, got 5"):
        hide(Words(), 5, "task", list("abc"), [(0.9, "late"), (0.1, "early one")], [("why", False), ("so", True)])
    together = hide(Words(), 30, "task", list("abc"), [], [("why", False), (" so be it", True)])  # blanks have no tokens
    assert together.targets == [27, 28, 29]
    with pytest.raises(ValueError, match="depth"):
        hide(Words(), 30, "task", list("abc"), [(1.1, "late")], [])


def answered(model, plan, ids: list[int], tokens: int) -> list[int]:
    with torch.no_grad(), attention_of(model, plan):
        row = torch.tensor([ids])
        return model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=tokens, do_sample=False)[
            0, -tokens:
        ].tolist()


@pytest.mark.parametrize("plan", PLANS, ids=["full", "layers", "heads"])
def test_one_prefill_says_what_greedy_decoding_answers(model, plan):
    """Exact match <=> every teacher-forced argmax is the answer's token."""
    generator = torch.Generator().manual_seed(5)
    for length in (20, 150):
        prompt = torch.randint(0, 100, (length,), generator=generator).tolist()
        answer = answered(model, plan, prompt, 6)
        positions = (tuple(range(length, length + 6)),)
        right = Sample(tuple(prompt + answer), positions)
        wrong = [Sample((*right.ids[:p], (right.ids[p] + 1) % 100, *right.ids[p + 1 :]), positions) for p in positions[0]]
        verdicts = score(model, [right, *wrong], plan)
        assert [verdict.exact for verdict in verdicts] == [True] + [False] * 6
        assert verdicts[0].logprob > max(verdict.logprob for verdict in verdicts[1:])


@pytest.mark.parametrize("plan", PLANS, ids=["full", "layers", "heads"])
def test_batches_change_nothing_and_logprobs_are_those_of_the_model(model, tokenizer, plan):
    samples = [*evaluate.multivalue.samples(tokenizer, 400, [0.2, 0.9], 2), *evaluate.passkey.samples(tokenizer, 500, [0.5], 2)]
    random.Random(0).shuffle(samples)
    done = []
    batched, single = score(model, samples, plan, 900, done.append), score(model, samples, plan, 1)
    assert sum(done) == 6 and len(done) < 6
    assert [v.logprob for v in batched] == pytest.approx([v.logprob for v in single], abs=1e-4)
    with torch.no_grad(), attention_of(model, plan):
        for sample, verdict in zip(samples, single, strict=True):
            logprobs = model(torch.tensor([sample.ids]), use_cache=False).logits[0].log_softmax(-1)
            wanted = [float(logprobs[position - 1, sample.ids[position]]) for position in sample.targets]
            assert verdict.logprob == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)


def test_a_task_gives_a_row_per_cell_and_the_same_rows_again(model, tokenizer):
    options = {"lengths": [400, 600], "depths": [0.1, 0.9], "prompts": 3}
    each = zz.evaluate.passkey(model, tokenizer, PLAN, name="mine", **options)
    assert [(row.length, row.depth) for row in each] == [(400, 0.1), (400, 0.9), (600, 0.1), (600, 0.9)]
    assert {(row.plan, row.kinds, row.sink, row.window, row.prompts) for row in each} == {("mine", "101", 4, 32, 3)}
    assert each == zz.evaluate.passkey(model, tokenizer, PLAN, name="mine", **options)
    pooled = zz.evaluate.passkey(model, tokenizer, PLAN, pooled=True, **options)
    assert [(row.length, row.depth, row.prompts) for row in pooled] == [(400, None, 6), (600, None, 6)]
    assert pooled[0].logprob == pytest.approx((each[0].logprob + each[1].logprob) / 2)
    text = zz.evaluate.perplexity(model, tokenizer, PLANS[2], lengths=[300], prompts=2)
    assert [(row.depth, row.kinds, row.prompts) for row in text] == [(None, "01/11/00", 2)]


def test_impossible_evaluations_are_refused(model, tokenizer):
    for options, named in [
        ({"lengths": [4096]}, "context of 3072"),
        ({"lengths": [100]}, "at least"),
        ({"lengths": [600], "depths": [2.0]}, "depth"),
        ({"lengths": [600], "prompts": 0}, "prompts"),
    ]:
        with pytest.raises(ValueError, match=named):
            zz.evaluate.passkey(model, tokenizer, **options)
    with pytest.raises(ValueError, match="perplexity"):
        zz.evaluate.perplexity(model, tokenizer, lengths=[1])


def test_wilson_interval():
    assert rows.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert rows.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert rows.wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_statistics_of_a_cell():
    values = rows.statistics([Verdict(True, -1.0, (-1.0,)), Verdict(False, -3.0, (-3.0,)), Verdict(True, -2.0, (-2.0,))])
    assert (values["prompts"], values["exact"], values["logprob"]) == (3, pytest.approx(2 / 3), pytest.approx(-2.0))
    assert values["logprob_high"] - values["logprob"] == pytest.approx(1.959964 / math.sqrt(3))
    assert rows.statistics([Verdict(True, -1.0, (-1.0,))])["logprob_low"] == -math.inf


def test_rows_survive_the_csv(model, tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    first = zz.evaluate.passkey(model, tokenizer, PLAN, lengths=[400], depths=[0.5], prompts=2)
    second = zz.evaluate.perplexity(model, tokenizer, lengths=[400], prompts=2)
    evaluate.append(path, first)
    evaluate.append(path, second)
    back = evaluate.read(path)
    assert [row.cell for row in back] == [row.cell for row in first + second]
    assert back[1].logprob == pytest.approx(second[0].logprob, rel=1e-5)
    path.write_text(path.read_text().replace("0.5", "half", 1))
    with pytest.raises(ValueError, match="rows.csv:2"):
        evaluate.read(path)
    path.write_text(path.read_text()[:-2])
    with pytest.raises(ValueError, match="rows.csv:3: the line has no end"):
        evaluate.read(path)
    path.write_text("a,b\n1,2\n")
    for action in (lambda: evaluate.read(path), lambda: evaluate.append(path, first)):
        with pytest.raises(ValueError, match="columns"):
            action()


def test_encode_adds_no_special_tokens(tokenizer):
    assert tokenizer.decode(encode(tokenizer, "a b")).replace(" ", "") == "ab" and len(encode(tokenizer, "a b")) == 3
    assert LAYERS == 3 and KV_HEADS == 2


COMPRESS = zz.PromptWindows(budget=120, window=4, observe=8)


@pytest.mark.parametrize("name", ["multikey", "second_question", "perplexity"])
def test_a_compressed_prompt_is_answered_as_generate_answers_it(model, tokenizer, name):
    """Log-probabilities are those of steps on a cache whose prompt was compressed."""
    samples = TASKS[name].samples(tokenizer, 700, [0.1], 2)
    verdicts, plain = score(model, samples, PLAN, compress=COMPRESS), score(model, samples, PLAN)
    with torch.no_grad(), attention_of(model, PLAN, COMPRESS):
        for sample, verdict in zip(samples, verdicts, strict=True):
            ids, logits = torch.tensor([sample.ids]), []
            cache = zz.ZigzagCache(model.config, PLAN, compress=COMPRESS)
            for start, stop in [(0, sample.prompt), *((p, p + 1) for p in range(sample.prompt, len(sample.ids)))]:
                logits.append(model(ids[:, start:stop], past_key_values=cache).logits[0])
            assert cache.compressed[1][1] > 50
            logprobs = torch.cat(logits).log_softmax(-1)
            wanted = [float(logprobs[position - 1, sample.ids[position]]) for position in sample.targets]
            assert verdict.logprob == pytest.approx(sum(wanted) / len(wanted), abs=1e-4)
    assert max(abs(a.logprob - b.logprob) for a, b in zip(verdicts, plain, strict=True)) > 1e-3


def test_prompts_are_read_once_for_many_methods(model, tokenizer):
    samples = [*evaluate.multikey.samples(tokenizer, 500, [0.2, 0.9], 2), *evaluate.quotation.samples(tokenizer, 900, [0.5], 2)]
    methods = [COMPRESS, None, METHODS["recent"](budget=0.2, observe=4), METHODS["chunkkv"](budget=0.3, observe=8)]
    each = evaluate.score_each(model, samples, PLAN, methods, batch_tokens=1000)
    for method, verdicts in zip(methods, each, strict=True):
        alone = score(model, samples, PLAN, 1000, compress=method)
        assert [v.logprob for v in verdicts] == pytest.approx([v.logprob for v in alone], abs=1e-5)
    assert len({round(sum(v.logprob for v in verdicts), 4) for verdicts in each}) == 4


def test_rows_name_the_compression(model, tokenizer, tmp_path):
    found = evaluate.multikey(model, tokenizer, PLAN, lengths=[600], depths=[0.2], prompts=2, compress=COMPRESS)
    assert [row.compress for row in found] == ["windows 120 observe=8 window=4"]
    plain = evaluate.multikey(model, tokenizer, PLAN, lengths=[600], depths=[0.2], prompts=2)
    assert plain[0].compress == "" and plain[0].cell != found[0].cell
    evaluate.append(tmp_path / "rows.csv", [*found, *plain])
    assert [row.compress for row in evaluate.read(tmp_path / "rows.csv")] == ["windows 120 observe=8 window=4", ""]
    with pytest.raises(ValueError, match="needs a plan"):
        evaluate.multikey(model, tokenizer, lengths=[600], compress=COMPRESS)
