"""enable() compares what a plan was made for with the model: another geometry is refused, another name warned of once."""

import json
import warnings

import numpy as np
import pytest
import torch
from tiny_models import NUM_LAYERS, generate, new_model, prompt, tiny_model

import zigzag_ext as zz
from zigzag_ext.planning.scores import Scores

SCORES = np.linspace(0, 1, NUM_LAYERS * 2).reshape(NUM_LAYERS, 2)
OTHERS = {
    "kv_heads": np.ones((NUM_LAYERS, 4)),
    "layers": np.ones((3, 2)),
    "head_dim": Scores(SCORES, {"head_dim": 128}),
}
MESSAGES = {
    "kv_heads": "the plan is for 4 layers x 4 KV heads; the model has 4 layers x 2 KV heads of head_dim 64",
    "layers": "the plan is for 3 layers x 2 KV heads; the model has 4 layers x 2 KV heads of head_dim 64",
    "head_dim": "the plan is for 4 layers x 2 KV heads of head_dim 128; the model has 4 layers x 2 KV heads of head_dim 64",
}


@pytest.mark.parametrize("level", ["layer", "head"])
@pytest.mark.parametrize("what", OTHERS)
def test_a_plan_for_another_geometry_is_refused(what, level):
    model, plan = tiny_model(), zz.solve(OTHERS[what], 0.5, level=level, sink=4, window=16)
    for use in (lambda: zz.enable(model, plan), lambda: zz.ZigzagCache(model.config, plan)):
        with pytest.raises(ValueError) as raised:
            use()
        assert str(raised.value) == MESSAGES[what]
    assert model.config._attn_implementation == "sdpa"


def test_the_geometry_of_the_model_and_files_without_one_are_accepted(tmp_path):
    model, path = tiny_model(), tmp_path / "plan.json"
    plan = zz.solve(SCORES, 0.5, config=model.config, sink=4, window=16)
    plan.save(path)
    content = json.loads(path.read_text())
    del content["provenance"]["origin"]
    path.write_text(json.dumps(content))
    answers = []
    for each in (plan, zz.solve(SCORES, 0.5, sink=4, window=16), zz.Plan.load(path)):
        with zz.zigzag(model, each):
            answers.append(generate(model, 4, prompt(40)))
    assert answers[0].equal(answers[1]) and answers[0].equal(answers[2])


def test_a_plan_for_another_model_is_warned_of_once():
    model = new_model("llama")
    model.config._name_or_path = "org/served"
    plan_for = lambda name: zz.solve(Scores(SCORES, {"model": name}), 0.5, sink=4, window=16)  # noqa: E731
    with warnings.catch_warnings(record=True) as found, torch.no_grad():
        warnings.simplefilter("always")
        for name in ("org/served", "/data/served", "org/scored", "org/scored"):
            with zz.zigzag(model, plan_for(name)):
                model(prompt(5))
        zz.disable(zz.enable(tiny_model(), plan_for("org/scored")))  # a model without a name
    assert [str(warning.message).split(":")[0] for warning in found] == [
        "the plan was made for org/scored, the model is org/served"
    ]
    with warnings.catch_warnings(), pytest.raises(UserWarning):
        warnings.simplefilter("error")
        zz.enable(model, plan_for("org/third"))
    assert model.config._attn_implementation == "sdpa"
