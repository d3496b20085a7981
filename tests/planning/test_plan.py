"""Plan: what it accepts, what it derives, and its file format."""

import copy
import json
import os
import pickle
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zigzag_ext.planning.plan import Plan

KINDS = ("retrieval", "streaming", "streaming")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
PLANS = st.builds(
    Plan,
    st.lists(st.sampled_from(["retrieval", "streaming"]), min_size=1, max_size=40),
    sink=st.integers(0, 1 << 20),
    window=st.integers(1, 1 << 20),
    provenance=st.dictionaries(st.text(), JSON, max_size=3),
)


def a_plan(**changes) -> Plan:
    return Plan(**{"kinds": KINDS, "sink": 64, "window": 256, "provenance": {"objective": "mean"}, **changes})


def test_derived_values():
    plan = Plan(list(KINDS), sink=64, window=256)
    assert plan.kinds == KINDS
    assert plan.num_layers == 3
    assert plan.retrieval_layers == (0,)
    assert plan.streaming_layers == (1, 2)
    assert plan.retrieval_ratio == pytest.approx(1 / 3)
    assert plan.provenance == {}
    assert repr(plan) == "<Plan RSS: 1 retrieval, 2 streaming, sink 64, window 256>"


def test_is_immutable_hashable_and_copies():
    plan = a_plan()
    with pytest.raises(AttributeError):
        plan.sink = 3
    assert hash(plan) == hash(a_plan(provenance={}))
    assert plan != a_plan(provenance={})
    assert plan == a_plan() != a_plan(window=255)
    assert copy.deepcopy(plan) == pickle.loads(pickle.dumps(plan)) == plan


def test_provenance_is_a_copy_in_json_types(tmp_path):
    given_ = {"pair": (1, 2), "inner": {"a": [1]}}
    plan = a_plan(provenance=given_)
    given_["inner"]["a"].append(2)
    assert plan.provenance == {"pair": [1, 2], "inner": {"a": [1]}}
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


def test_summary_names_every_layer_once():
    kinds = ["retrieval"] * 3 + ["streaming"] * 2 + ["retrieval"] + ["streaming"]
    lines = Plan(kinds, sink=4, window=8, provenance={"retained_score": 0.75, "layer_values": [1, 2]}).summary().splitlines()
    table = {line.split("  ")[0]: line.split("  ", 1)[1].strip() for line in lines}
    assert table == {
        "layers": "7",
        "retrieval": "4 (57%): 0-2 5",
        "streaming": "3: 3-4 6",
        "sink": "4 tokens",
        "window": "8 tokens",
        "retained score": "0.75",
    }
    assert "none" in Plan(["streaming"], sink=0, window=1).summary()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"kinds": []}, ValueError, "at least one layer"),
        ({"kinds": ["retrieval", "full"]}, ValueError, 'layer 1 has the kind "full"; supported: retrieval, streaming'),
        ({"kinds": ["Retrieval"]}, ValueError, '"Retrieval"'),
        ({"kinds": "retrieval"}, TypeError, "list of 'retrieval' and 'streaming'"),
        ({"kinds": None}, TypeError, "got None"),
        ({"kinds": 3}, TypeError, "got 3"),
        ({"kinds": ["retrieval", 1]}, TypeError, "got 1 for layer 1"),
        ({"sink": -1}, ValueError, "sink must be >= 0 tokens, got -1"),
        ({"window": 0}, ValueError, "window must be >= 1 token"),
        ({"window": -5}, ValueError, "got -5"),
        ({"window": 1 << 31}, ValueError, "at most 2147483647"),
        ({"sink": 10**30}, ValueError, "does not fit"),
        ({"sink": 64.0}, TypeError, "sink must be an integer number of tokens, got 64.0"),
        ({"sink": True}, TypeError, "got True"),
        ({"window": "256"}, TypeError, "got '256'"),
        ({"window": None}, TypeError, "got None"),
        ({"provenance": []}, TypeError, "provenance must be a dict"),
        ({"provenance": {"x": object()}}, TypeError, "what JSON can hold"),
        ({"provenance": {"x": float("nan")}}, TypeError, "what JSON can hold"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error) as raised:
        a_plan(**changes)
    assert message in str(raised.value)


@given(plan=PLANS)
def test_round_trip(plan, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert Plan.load(str(path)) == plan


def test_file_format(tmp_path):
    path = tmp_path / "plan.json"
    a_plan().save(path)
    assert json.loads(path.read_text()) == {
        "format": "zigzag-plan",
        "version": 1,
        "kinds": list(KINDS),
        "sink": 64,
        "window": 256,
        "provenance": {"objective": "mean"},
    }


def test_save_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    old = a_plan()
    old.save(path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        a_plan(sink=1).save(path)
    assert Plan.load(path) == old
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]


def test_save_replaces_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "plan.json"
    a_plan().save(path)
    a_plan(sink=1).save(path)
    assert Plan.load(path).sink == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(FileNotFoundError, match="no folder"):
        a_plan().save(tmp_path / "missing" / "plan.json")


def content(**changes) -> dict:
    fields = {"format": "zigzag-plan", "version": 1, "kinds": list(KINDS), "sink": 64, "window": 256, "provenance": {}}
    return {name: value for name, value in {**fields, **changes}.items() if value is not ...}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", '"format": "zigzag-plan"'),
        ("3", '"format": "zigzag-plan"'),
        (content(format=...), '"format": "zigzag-plan"'),
        (content(format="zigzag-scores"), '"format": "zigzag-plan"'),
        (content(version=7), "version 7, from a newer zigzag_ext; this one supports versions up to 6"),
        (content(version=...), "version is None; supported: 1"),
        (content(version=0), "version is 0; supported: 1"),
        (content(version="1"), "version is '1'"),
        (content(version=True), "version is True"),
        (content(kinds=...), "missing fields: kinds"),
        (content(sink=..., window=...), "missing fields: sink, window"),
        (
            content(layers=3),
            "unknown fields: layers; known: format, key_smoothing, kinds, kv_format, layer_sizes, provenance, ring_kv_format, ",
        ),
        (content(kinds=[]), "at least one layer"),
        (content(kinds=["full"]), '"full"; supported: retrieval, streaming'),
        (content(kinds="retrieval"), "kinds must be a list"),
        (content(kinds=[0, 1]), "kinds must hold strings"),
        (content(kinds=None), "kinds must be a list"),
        (content(sink="64"), "sink must be an integer"),
        (content(sink=1.5), "sink must be an integer"),
        (content(sink=-1), "sink must be >= 0"),
        (content(window=0), "window must be >= 1"),
        (content(window=True), "window must be an integer"),
        (content(window=10**40), "does not fit"),
        (content(provenance=[]), "provenance must be a dict"),
        (content(provenance={"x": float("inf")}), "what JSON can hold"),
    ],
)
def test_load_errors_name_the_file_and_the_reason(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(ValueError) as raised:
        Plan.load(path)
    assert str(path) in str(raised.value)
    assert message in str(raised.value)


def test_load_of_other_things(tmp_path):
    with pytest.raises(FileNotFoundError, match="no plan file at .*absent.json"):
        Plan.load(tmp_path / "absent.json")
    with pytest.raises(OSError):
        Plan.load(tmp_path)
    binary = tmp_path / "plan.pt"
    binary.write_bytes(b"PK\x03\x04\xff\xfe\x80")
    with pytest.raises(ValueError, match="is not a plan file"):
        Plan.load(binary)


def test_load_without_provenance(tmp_path):
    path = tmp_path / "by_hand.json"
    path.write_text(json.dumps(content(provenance=...)))
    assert Plan.load(path) == Plan(KINDS, sink=64, window=256)


def test_kv_formats_are_kept(tmp_path):
    plan = Plan(KINDS, sink=4, window=8, kv_format={"k": "int8", "v": "int4"}, ring_kv_format="fp8")
    assert plan.kv_format == ("int8", "int4") and plan.ring_kv_format == ("fp8", "fp8")
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 2
    assert "int8/int4" in repr(plan) and "int8/int4" in plan.summary()
    assert Plan(KINDS, sink=4, window=8, kv_format="int8/int4", ring_kv_format="fp8") == plan
    assert hash(plan) == hash(Plan.load(tmp_path / "plan.json"))
    assert Plan(KINDS, sink=4, window=8, kv_format="none") == Plan(KINDS, sink=4, window=8)


@pytest.mark.parametrize("wrong,error", [("int2", ValueError), ({"k": "fp8"}, TypeError), (8, TypeError), ("fp8/", ValueError)])
def test_unknown_kv_formats(wrong, error):
    with pytest.raises(error, match="kv_format .*fp8, int8, int4"):
        Plan(KINDS, sink=4, window=8, kv_format=wrong)


def test_key_smoothing_is_kept_and_needs_quantised_keys(tmp_path):
    plan = Plan(KINDS, sink=4, window=8, ring_kv_format="int4/none", key_smoothing=True)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan != replace(plan, key_smoothing=False)
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 4
    assert "key_smoothing" in repr(plan) and "key smoothing" in plan.summary()
    with pytest.raises(ValueError, match="key_smoothing needs quantised keys.*none/int8"):
        Plan(KINDS, sink=4, window=8, kv_format="none/int8", key_smoothing=True)
    with pytest.raises(TypeError, match="True or False, got 1"):
        Plan(KINDS, sink=4, window=8, kv_format="int8", key_smoothing=1)
