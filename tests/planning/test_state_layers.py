"""Plans of models with layers that keep no keys: what a plan says, files, formats, and solving over the layers that attend."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

import zigzag_ext as zz
from zigzag_ext import _C
from zigzag_ext.planning.costs import kv_costs
from zigzag_ext.planning.exchange import to_duo, to_layer_string, to_layer_types
from zigzag_ext.planning.layers import layer_kinds
from zigzag_ext.planning.native import check_native, native_windows, whole_plan
from zigzag_ext.planning.plan import Plan

WINDOWS = (0, None, 16, 0, None)
WHOLE = Plan(["retrieval", "streaming"], sink=4, window=8).with_native(WINDOWS)
SCORES = np.array([[0.9, 0.8], [0.1, 0.2]])


def test_layers_without_keys_take_the_places_that_the_model_gives_them():
    assert WHOLE.kinds == ("state", "retrieval", "native", "state", "streaming")
    assert (WHOLE.state_layers, WHOLE.native_layers, WHOLE.full_layers) == ((0, 3), (2,), (1, 4))
    assert WHOLE.native_windows == WINDOWS and WHOLE.retrieval_ratio == 0.5
    assert [WHOLE.size(layer) for layer in range(5)] == [(0, 0), (0, 0), (0, 16), (0, 0), (4, 8)]
    assert repr(WHOLE).startswith("<Plan -RN-S: 2 without keys, 1 native windows of 16, 2 full: 1 retrieve, 1 stream, sink 4")
    lines = dict(line.split("  ", 1) for line in WHOLE.summary().splitlines())
    assert lines["layers"].strip() == "5: 2 without keys, 1 native windows of 16, 2 full: 1 retrieve, 1 stream"
    assert lines["without keys"].strip() == "2: 0 3" and lines["retrieval"].strip() == "1 (50%): 1"
    assert whole_plan(WINDOWS).kinds == ("state", "retrieval", "native", "state", "retrieval")


def test_files_of_version_6(tmp_path):
    WHOLE.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text())
    assert content["version"] == 6 and content["kinds"][0] == "state" and content["layer_sizes"][0] is None
    assert Plan.load(tmp_path / "plan.json") == WHOLE


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kinds": ["state"], "layer_sizes": [(0, 8)]}, "layer 0 keeps no keys and has no sink and window"),
        ({"kinds": [["state", "retrieval"]]}, "layer 0 mixes state heads with others; a state layer is one as a whole"),
    ],
)
def test_what_a_layer_without_keys_cannot_have(changes, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"sink": 4, "window": 8} | changes)


def test_formats_that_know_no_such_layers_refuse_them(tmp_path):
    for call in (to_layer_types, to_layer_string, lambda plan: to_duo(plan, tmp_path / "duo", 2)):
        with pytest.raises(ValueError, match="needs layers with attention; layers 0 3 keep no keys"):
            call(WHOLE)
    assert not (tmp_path / "duo").exists()


@pytest.mark.parametrize(
    "fields, windows",
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, (0, None)),
        ({"layer_types": ["conv", "sliding_attention", "full_attention"], "sliding_window": 16}, (0, 16, None)),
        ({"layers_block_type": ["mamba", "attention", "moe", "mlp"]}, (0, None, 0, 0)),
        ({"layer_types": ["hybrid", "hybrid"], "layers_block_type": ["mamba", "mamba"]}, (None, None)),
    ],
)
def test_layers_of_a_config(fields, windows):
    config = {"num_hidden_layers": len(windows), **fields}
    assert native_windows(config) == windows == native_windows(SimpleNamespace(**config))
    assert layer_kinds(config) == next(iter(fields.values()))


@pytest.mark.parametrize(
    "plan, words",
    [
        (
            Plan(["retrieval"] * 2, sink=4, window=8),
            "the model has 5, of which 1 4 are full-attention layers and the others native windows or without keys",
        ),
        (Plan(["retrieval"] * 5, sink=4, window=8), "layer 0 has no keys in the model, full attention in the plan"),
        (whole_plan([0, 0, 16, 0, None]), "layer 1 has full attention in the model, no keys in the plan"),
    ],
)
def test_a_plan_of_another_model_is_refused(plan, words):
    with pytest.raises(ValueError, match=words):
        check_native(plan, WINDOWS)
    check_native(WHOLE, WINDOWS)


def test_solve_chooses_among_the_layers_that_attend_and_counts_their_bytes():
    sizes = {"head_dim": 64, "context": 1000, "sink": 4, "window": 8}
    retrieval, streaming = kv_costs(2, 2, 64, 2, 1000, sink=4, window=8)
    plan = zz.solve(SCORES, retrieval_layers=1, native=WINDOWS, **sizes)
    assert plan.kinds == WHOLE.kinds
    assert plan.provenance["kv_bytes"] == retrieval[0] + streaming[1] + _C.kv_bytes(16, 2, 64, 2)
    with pytest.raises(ValueError, match="force_streaming: layer 3 is none of the model's full-attention layers, 1 4"):
        zz.solve(SCORES, retrieval_layers=1, native=WINDOWS, force_streaming=[3])


def test_the_scheduler_has_no_caches_for_them():
    scheduler = _C.Scheduler(WHOLE.kinds, 4, 8, 4, 2, 64, "bfloat16", layer_sizes=WHOLE.layer_sizes)
    token = 2 * 2 * 64 * 2
    assert scheduler.launches_per_step == 3 and scheduler.heads(0) == {}
    assert scheduler.kv_bytes(1, 1000) == (1000 + 16 + 12) * token and scheduler.kv_bytes(1, 1000, "state") == 0
    assert scheduler.all_retrieval_kv_bytes(1, 1000) == 3 * 1000 * token
    assert re.search("5 layers: 1 retrieval, 1 streaming, 1 native, 2 without keys", repr(scheduler))
    with pytest.raises(ValueError, match="layer 0 keeps no keys: it has no cache"):
        scheduler.slots(0, 1000)
