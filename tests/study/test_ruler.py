"""RULER on the real lm-eval (`pip install 'zigzag_ext[ruler]'`): collected only where it is installed (0.5 GB).
`test_harness.py` tests the same code everywhere, on a stand-in."""

import re

import numpy as np
import pytest
from transformers import AutoTokenizer

import zigzag_ext as zz
from zigzag_ext.cli import demo
from zigzag_ext.study import evaluate
from zigzag_ext.study import lm_eval as harness
from zigzag_ext.study.evaluate import ruler

PLAN = zz.Plan(["streaming", "retrieval", "streaming"], sink=2, window=16)


@pytest.mark.parametrize("name", evaluate.RULER)
def test_every_task_is_offline_and_has_the_answer_in_its_prompts(name, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(demo.model_folder())  # RULER's prompts are too long for tokens of one character
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was used"))
    task = ruler._load(name, tokenizer, 1024, 7)
    task.build_all_requests(limit=2, rank=0, world_size=1)
    for request in task.instances:
        text, options = request.args
        assert all(answer in text for answer in request.doc["outputs"]) and options["max_gen_toks"] > 0
        assert task.process_results(request.doc, [" ".join(request.doc["outputs"])])["1024"] == 1.0
        assert task.process_results(request.doc, ["nothing"])["1024"] == 0.0
    ruler._load.cache_clear()
    again = ruler._load(name, tokenizer, 1024, 7)
    again.build_all_requests(limit=2, rank=0, world_size=1)
    assert [request.args for request in again.instances] == [request.args for request in task.instances]


def test_same_score_as_lm_eval_reports(model, model_folder, tmp_path):
    """`zigzag eval` and lm-eval's own evaluation of the model `zigzag` agree on the same prompts, for every plan."""
    import lm_eval

    PLAN.save(tmp_path / "plan.json")
    tokenizer = AutoTokenizer.from_pretrained(model_folder, eos_token="\f")  # lm-eval stops at it
    task = ruler._load("ruler_fwe", tokenizer, 1024, 3)
    [row] = evaluate.RULER["ruler_fwe"](model, tokenizer, PLAN, lengths=[1024], prompts=3, seed=3)
    options = {"plan": str(tmp_path / "plan.json"), "device": "cpu", "dtype": "float32", "tokenizer": tokenizer}
    network = harness.register()(str(model_folder), **options, batch_size=2)
    found = lm_eval.evaluate(network, {"ruler_fwe": task}, limit=3, bootstrap_iters=0)["samples"]["ruler_fwe"]
    assert np.mean([sample["1024"] for sample in found]) == pytest.approx(row.exact)
    assert all(re.search("coded", sample["arguments"][0][0]) for sample in found)
