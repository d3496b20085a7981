"""Plans of models with sliding windows of their own: what a plan says, files, and solving over the full-attention layers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import Cohere2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

import zigzag_ext as zz
from zigzag_ext import _C
from zigzag_ext.planning.costs import kv_costs
from zigzag_ext.planning.exchange import to_duo, to_layer_string, to_layer_types
from zigzag_ext.planning.native import check_native, native_windows, whole_plan
from zigzag_ext.planning.plan import Plan

WINDOWS = (16, None, 16, None, None, 16)
FULL = Plan(["retrieval", "streaming", "retrieval"], sink=4, window=8, provenance={"layer_values": [0.5, 0.25, 0.75]})
WHOLE = FULL.with_native(WINDOWS)
SCORES = np.array([[0.9, 0.8], [0.1, 0.2], [0.5, 0.4]])


def test_native_layers_take_the_places_that_the_model_gives_them():
    assert WHOLE.kinds == ("native", "retrieval", "native", "streaming", "retrieval", "native")
    assert (WHOLE.native_layers, WHOLE.full_layers, WHOLE.native_windows) == ((0, 2, 5), (1, 3, 4), WINDOWS)
    assert [WHOLE.size(layer) for layer in range(6)] == [(0, 16), (0, 0), (0, 16), (4, 8), (0, 0), (0, 16)]
    assert WHOLE.retrieval_ratio == pytest.approx(2 / 3) == FULL.retrieval_ratio
    assert FULL.with_native([None] * 3) is FULL
    assert whole_plan([4, 8]).retrieval_ratio == 1.0
    assert repr(WHOLE).startswith("<Plan NRNSRN: 3 native windows of 16, 3 full: 2 retrieve, 1 stream, sink 4")


def test_summary_counts_windows_and_rates_full_layers():
    windows = [1024 if layer % 5 else None for layer in range(30)]
    plan = Plan(["retrieval", "streaming"] * 3, sink=4, window=8, provenance={"layer_values": [1, 2, 3, 4, 5, 6]})
    lines = dict(line.split("  ", 1) for line in plan.with_native(windows).summary().splitlines())
    assert lines["layers"].strip() == "30: 24 native windows of 1024, 6 full: 3 retrieve, 3 stream"
    assert lines["retrieval"].strip() == "3 (50%): 0 10 20" and lines["native"].strip().startswith("24: 1-4 6-9")
    assert lines["layers 0 5 10 15 20 25"].split() == ["1*", "2", "3*", "4", "5*", "6"]


def test_layers_with_a_size_of_their_own():
    plan = Plan(["streaming", "retrieval", "streaming"], sink=4, window=8, layer_sizes=[(4, 8), None, (2, 5)])
    assert plan.layer_sizes == (None, None, (2, 5)) and plan.size(0) == (4, 8) and plan.size(2) == (2, 5)
    assert "layer 2    sink 2, window 5" in plan.summary()
    assert plan == Plan(plan.kinds, sink=4, window=8, layer_sizes=[None, None, [2, 5]])
    assert Plan(plan.kinds, sink=4, window=8, layer_sizes=[None] * 3).layer_sizes == ()


def test_files_of_version_5(tmp_path):
    path = tmp_path / "plan.json"
    WHOLE.save(path)
    content = json.loads(path.read_text())
    assert content["version"] == 5 and content["layer_sizes"] == [[0, 16], None, [0, 16], None, None, [0, 16]]
    assert Plan.load(path) == WHOLE
    FULL.save(path)
    assert json.loads(path.read_text())["version"] == 1


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"kinds": ["native"]}, ValueError, "layer 0 is native and needs a size of its own"),
        ({"kinds": ["native"], "layer_sizes": [(1, 8)]}, ValueError, "layer 0 is native: its sink must be 0, got 1"),
        ({"kinds": ["native"], "layer_sizes": [(0, 0)]}, ValueError, "layer 0: window must be >= 1 token"),
        ({"kinds": ["streaming"], "layer_sizes": [(-1, 8)]}, ValueError, "layer 0: sink must be >= 0 tokens, got -1"),
        ({"kinds": ["streaming"], "layer_sizes": [(1, 1 << 31)]}, ValueError, "layer 0: sink + window must be at most 21474"),
        ({"kinds": ["retrieval"], "layer_sizes": [(0, 8)]}, ValueError, "layer 0 retrieves: it keeps every token"),
        ({"kinds": ["streaming"] * 2, "layer_sizes": [None]}, ValueError, "layer_sizes has 1 entries, the plan has 2 layers"),
        ({"kinds": [["native", "retrieval"]], "layer_sizes": [(0, 8)]}, ValueError, "layer 0 mixes native heads with others"),
        ({"kinds": ["streaming"], "layer_sizes": [8]}, TypeError, "layer_sizes must hold (sink, window) or None, got 8"),
        ({"kinds": ["streaming"], "layer_sizes": [(0, 8.0)]}, TypeError, "layer 0: window must be an integer number"),
        ({"kinds": ["streaming"], "layer_sizes": 8}, TypeError, "layer_sizes must be a list of (sink, window) or None"),
    ],
)  # fmt: skip
def test_sizes_that_no_plan_can_have(changes, error, message):
    with pytest.raises(error) as raised:
        Plan(**{"sink": 4, "window": 8} | changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "config, windows",
    [
        (LlamaConfig(num_hidden_layers=3), (None,) * 3),
        (MistralConfig(num_hidden_layers=2, sliding_window=64), (64, 64)),
        (MistralConfig(num_hidden_layers=2, sliding_window=None), (None, None)),
        (Gemma3TextConfig(num_hidden_layers=7, sliding_window=512), (*[512] * 5, None, 512)),
        (Cohere2Config(num_hidden_layers=4, sliding_window=32, sliding_window_pattern=2), (32, None, 32, None)),
        (Qwen2Config(num_hidden_layers=3, use_sliding_window=True, sliding_window=8, max_window_layers=2), (None, None, 8)),
        (Qwen2Config(num_hidden_layers=2, use_sliding_window=False, sliding_window=8), (None, None)),
    ],
)
def test_windows_of_a_config(config, windows):
    assert native_windows(config) == windows == zz.native_windows(config)


def test_a_window_that_is_no_number_of_tokens():
    with pytest.raises(ValueError, match="config.sliding_window must be a number of tokens, as layers slide; got None"):
        native_windows(SimpleNamespace(num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=None))


@pytest.mark.parametrize(
    "plan, words",
    [
        (FULL, r"the plan has 3 layers, the model has 6, of which 1 3-4 are full-attention layers .* plan.with_native\("),
        (Plan(["retrieval"] * 6, sink=4, window=8), "layer 0 has a native window of 16 in the model, full attention in the plan"),
        (FULL.with_native([16, None, 8, None, None, 16]), "layer 2 has a native window of 16 in the model, a native window of 8"),
        (FULL.with_native([None, 16, 16, None, None, 16]), "layer 0 has a native window of 16 in the model, full attention"),
    ],
)
def test_a_plan_of_another_model_is_refused_with_the_layers(plan, words):
    with pytest.raises(ValueError, match=words):
        check_native(plan, WINDOWS)
    check_native(WHOLE, WINDOWS)
    with pytest.raises(ValueError, match="layer 0 has full attention in the model, a native window of 16 in the plan"):
        check_native(WHOLE, [None] * 6)


def test_with_native_needs_as_many_layers_as_the_model_leaves_open():
    with pytest.raises(ValueError, match="the plan has 3 layers, the model has 2 full-attention layers: 0 3"):
        FULL.with_native([None, 8, 8, None])
    with pytest.raises(ValueError, match="the plan has native layers, or ones without keys, already: 0 2 5"):
        WHOLE.with_native(WINDOWS)


def test_solve_chooses_among_the_full_layers_and_keeps_the_windows():
    plan = zz.solve(SCORES, retrieval_layers=1, sink=4, window=8, native=WINDOWS)
    assert plan.kinds == ("native", "retrieval", "native", "streaming", "streaming", "native")
    assert plan.provenance["layer_values"] == zz.solve(SCORES, retrieval_layers=1, sink=4, window=8).provenance["layer_values"]
    forced = zz.solve(SCORES, retrieval_layers=1, native=WINDOWS, force_retrieval=[4], force_streaming=[1])
    assert forced.retrieval_layers == (4,) and forced.provenance["constraints"]["force_retrieval"] == [4]
    assert zz.solve(SCORES, retrieval_ratio=1, native=WINDOWS, stages=[2, 2, 2]).retrieval_layers == (1, 3, 4)
    heads = zz.solve(SCORES, 0.5, level="head", native=WINDOWS)
    assert heads.native_windows == WINDOWS and heads.kinds[1] == "retrieval"


def test_solve_counts_the_bytes_of_the_whole_model():
    sizes = {"head_dim": 64, "context": 1000, "sink": 4, "window": 8, "rollback": 3}
    retrieval, streaming = kv_costs(3, 2, 64, 2, 1000, sink=4, window=8, rollback=3)
    rings = 3 * _C.kv_bytes(16 + 3, 2, 64, 2)
    plan = zz.solve(SCORES, retrieval_layers=1, native=WINDOWS, **sizes)
    assert plan.provenance["kv_bytes"] == retrieval[0] + 2 * streaming[0] + rings
    for budget, kept in ((plan.provenance["kv_bytes"], 1), (plan.provenance["kv_bytes"] - 1, 0)):
        assert len(zz.solve(SCORES, kv_bytes=budget, native=WINDOWS, **sizes).retrieval_layers) == kept
    by_head = zz.solve(SCORES, retrieval_ratio=0, level="head", native=WINDOWS, **sizes)
    assert by_head.provenance["kv_bytes"] == 3 * streaming[0] + rings


@pytest.mark.parametrize(
    "options, message",
    [
        ({"native": [16, None, None]}, "scores have 3 rows, native names 2 full-attention layers, one per row: 1-2"),
        ({"native": [-1, None, None, None]}, "native: the window of layer 0 must be a number of tokens or 0: no keys; got -1"),
        (
            {"native": WINDOWS, "force_retrieval": [0]},
            "force_retrieval: layer 0 is none of the model's full-attention layers, 1 3-4",
        ),
        ({"native": WINDOWS, "stages": [2, 2]}, "stages hold 4 layers, the model has 6"),
        ({"native": WINDOWS, "head_dim": [64] * 3}, "head_dim must be one number or one per layer, 6, got 3"),
    ],
)
def test_solve_refuses_what_does_not_fit_the_model(options, message):
    with pytest.raises(ValueError) as raised:
        zz.solve(SCORES, **options)
    assert message in str(raised.value)


def test_other_projects_formats(tmp_path):
    same = Plan(["retrieval", "streaming"], sink=0, window=16).with_native([16, None, None])
    assert to_layer_types(same) == {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 16,
        "use_sliding_window": True,
    }
    with pytest.raises(ValueError, match="layer_types have one window for all sliding layers, the plan has 8 and 16"):
        to_layer_types(WHOLE)
    for call in (lambda: to_duo(WHOLE, tmp_path / "duo", 2), lambda: to_layer_string(WHOLE)):
        with pytest.raises(ValueError, match="needs one sink and window for all layers; layers 0 2 5 have their own"):
            call()
    assert not (tmp_path / "duo").exists()


def test_scheduler_tables_of_native_layers():
    scheduler = _C.Scheduler(
        WHOLE.kinds, 4, 8, num_q_heads=4, num_kv_heads=2, head_dim=64, dtype="bfloat16", rollback=3, layer_sizes=WHOLE.layer_sizes
    )
    assert [scheduler.slots(layer, 1000) for layer in range(6)] == [19, 1000, 19, 15, 1000, 19]
    assert scheduler.kernel(0, 1) == "decode_stream" and scheduler.heads(0) == {"native": (0, 1)}
    token = 2 * 2 * 64 * 2
    bytes_of = {"retrieval": 2 * 1000 * token, "streaming": 15 * token, "native": 3 * 19 * token}
    assert {kind: scheduler.kv_bytes(1, 1000, kind) for kind in bytes_of} == bytes_of
    assert scheduler.kv_bytes(1, 1000) == sum(bytes_of.values()) and "2 retrieval, 1 streaming, 3 native" in repr(scheduler)
