"""lm-eval's model `zigzag`, RULER's tasks in `zigzag eval`, and `zigzag lm-eval`, on a stand-in for lm-eval."""

import math
import random
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

import zigzag_ext as zz
from zigzag_ext.cli.main import app
from zigzag_ext.study import evaluate
from zigzag_ext.study import lm_eval as harness
from zigzag_ext.study.evaluate import ruler

from . import lm_eval_stub
from .conftest import LAYERS
from .lm_eval_stub import greedy

PLAN = zz.Plan(["streaming", "retrieval", "streaming"], sink=2, window=16)


@pytest.fixture
def calls(monkeypatch):
    """What `lm_eval` was called with."""
    found = []
    for name, module in lm_eval_stub.modules(lambda: found.append(sys.argv[1:])).items():
        monkeypatch.setitem(sys.modules, name, module)
    harness.register.cache_clear()
    ruler._load.cache_clear()
    lm_eval_stub.REGISTRY.clear()
    yield found
    harness.register.cache_clear()
    ruler._load.cache_clear()


@pytest.fixture
def plan_file(tmp_path):
    PLAN.save(tmp_path / "third.json")
    return tmp_path / "third.json"


def test_model_runs_the_plan_it_is_given(calls, model, tokenizer, model_folder, plan_file):
    text = "the quick brown fox " * 8
    full = greedy(model, tokenizer, text)
    with zz.zigzag(model, PLAN):
        streaming = greedy(model, tokenizer, text)
    assert full != streaming
    make = harness.register()
    assert lm_eval_stub.REGISTRY["zigzag"] is make
    options = {"device": "cpu", "dtype": "float32", "batch_size": 3}
    for arguments, expected in (({}, full), ({"plan": str(plan_file)}, streaming), ({"plan": PLAN}, streaming)):
        network = make(str(model_folder), **options, **arguments)
        assert greedy(network.model, network.tokenizer, text) == expected
        assert (network.backend, network.batch_size) == ("causal", 3)
    assert make(model, tokenizer=tokenizer).model is model
    network = make(str(model_folder), plan=PLAN, **options, kv_format="int4", ring_kv_format="int8", key_smoothing=True)
    ids = network.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    assert {str(store.kv_format) for store in network.model(**ids)[1].stores} == {"int4", "int8"}


@pytest.mark.parametrize(
    "arguments,named",
    [
        ({"peft": "x"}, "peft"),
        ({"gguf_file": "x", "parallelize": True}, "gguf_file, parallelize"),
        ({"compile": True, "kv_format": "int8"}, "compile, kv_format need a plan"),
    ],
)
def test_model_refuses_what_it_would_ignore(calls, model, tokenizer, arguments, named):
    with pytest.raises(ValueError, match=named):
        harness.register()(model, tokenizer=tokenizer, **arguments)


def test_rows_are_means_of_generated_answers(calls, model, tokenizer, capfd):
    done = []
    options = {"lengths": [60, 90], "prompts": 5, "seed": 3, "name": "third", "batch_tokens": 180, "advance": done.append}
    rows = evaluate.RULER["ruler_vt"](model, tokenizer, PLAN, **options)
    assert [(row.task, row.plan, row.kinds, row.length, row.prompts) for row in rows] == [
        ("ruler_vt", "third", "101", length, 5) for length in (60, 90)
    ]
    assert done == [3, 2, 2, 2, 1]
    random.seed(3)
    np.random.seed(3)
    with zz.zigzag(model, PLAN):
        task = lm_eval_stub.Task(60)
        answers = [greedy(model, tokenizer, doc["input"]) for doc in task.docs[:5]]
    expected = np.mean([task.process_results(task.docs[0], [answer])["60"] for answer in answers])
    assert rows[0].exact == pytest.approx(expected) and rows[0].exact_low < expected < rows[0].exact_high
    assert math.isnan(rows[0].logprob)
    assert "noise" not in "".join(capfd.readouterr())


def test_prompts_depend_on_the_seed_alone(calls, tokenizer, monkeypatch):
    def prompts(name, seed):
        ruler._load.cache_clear()
        before = random.getstate(), np.random.get_state()[1].tolist()
        monkeypatch.setitem(sys.modules, "lm_eval.tasks.ruler.cwe_utils", "has a generator of its own")
        found = [doc["input"] for doc in ruler._load(name, tokenizer, 60, seed).docs]
        assert "lm_eval.tasks.ruler.cwe_utils" not in sys.modules
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before
        return found

    first = prompts("ruler_cwe", 0)
    assert prompts("ruler_cwe", 0) == first != prompts("ruler_cwe", 1)


def test_impossible_requests_are_refused(calls, model, tokenizer, monkeypatch):
    task = evaluate.RULER["ruler_fwe"]
    with pytest.raises(ValueError, match="1 to 500, got 501"):
        task(model, tokenizer, lengths=[60], prompts=501)
    with pytest.raises(ValueError, match="context of 3072"):
        task(model, tokenizer, lengths=[3073], prompts=1)
    longer = lambda manager, names: {names[0]: lm_eval_stub.Task(3084)}  # noqa: E731
    monkeypatch.setattr(lm_eval_stub.TaskManager, "load_task_or_group", longer)
    with pytest.raises(ValueError, match="3079 tokens are more than the model's context of 3072"):
        task(model, tokenizer, lengths=[3000], prompts=1)


def test_commands(calls, model_folder, plan_file, tmp_path):
    run = lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})  # noqa: E731
    rows = tmp_path / "rows.csv"
    result = run("eval", model_folder, "--plan", plan_file, "--task", "niah_single_1", "--length", 60, "--prompts", 2, "-o", rows)
    assert result.exit_code == 0, result.output
    written = evaluate.read(rows)
    assert [(row.plan, row.kinds) for row in written] == [("full", "0" * LAYERS), ("third", "101")]
    assert f"third  niah_single_1  60      2        {written[1].exact:.0%}" in result.output
    arguments = ["--model", "zigzag", "--model_args", "pretrained=x,plan=y", "--limit", "1"]
    assert run("lm-eval", *arguments).exit_code == 0
    assert calls == [arguments] and list(lm_eval_stub.REGISTRY) == ["zigzag"]


def test_without_lm_eval_the_command_that_installs_it_is_named(monkeypatch, model_folder):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    for arguments in (["lm-eval", "--tasks", "ruler_vt"], ["eval", str(model_folder), "--task", "ruler_vt", "--length", "60"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and "zigzag_ext[ruler]" in result.stderr
