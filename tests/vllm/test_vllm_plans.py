"""What travels from a plan to vLLM's processes, on a command line or in Python, and what is refused. No vLLM is needed."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import zigzag_ext as zz
from zigzag_ext import vllm as plugin
from zigzag_ext.cli.main import app
from zigzag_ext.vllm.plans import KEY, refusal

UNIFORM = zz.Plan(["retrieval", "streaming"] * 2, sink=4, window=16)
SIZED = zz.Plan(["retrieval", "streaming", "streaming"], sink=4, window=16, layer_sizes=[None, None, (0, 9)])
NATIVE = zz.Plan(["retrieval", "streaming"], sink=4, window=16).with_native([64, None, 64, None])


def config(plan: zz.Plan, **fields) -> SimpleNamespace:
    """A model's config for the plan, as vLLM has it: the entries are attributes."""
    windows = sorted({window for window in plan.native_windows if window})
    kinds = ["sliding_attention" if kind == "native" else "full_attention" for kind in plan.kinds]
    geometry = {"num_hidden_layers": plan.num_layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    windowed = {"layer_types": kinds, "sliding_window": windows[0]} if windows else {}
    return SimpleNamespace(**geometry | windowed | fields)


def parsed(line: str) -> dict:
    """`hf_overrides` of a command line, by the rules that vLLM documents: dots nest, + makes a list, values are JSON or text."""
    entries, words = {}, shlex.split(line)
    for name, text in zip(words[::2], words[1::2], strict=True):
        *path, last = name.removeprefix("--hf-overrides.").split(".")
        place = entries
        for key in path:
            place = place.setdefault(key, {})
        try:
            value = text.split(",") if last.endswith("+") else json.loads(text)
        except json.JSONDecodeError:
            value = text
        place[last.removesuffix("+")] = value
    return entries


def vllm_args(*arguments):
    return CliRunner().invoke(app, ["vllm-args", *map(str, arguments)], env={"COLUMNS": "80", "NO_COLOR": "1"})


@pytest.mark.parametrize("plan", [UNIFORM, SIZED, NATIVE], ids=["uniform", "sized", "native"])
def test_the_arguments_carry_the_plan(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    result = vllm_args(tmp_path / "plan.json")
    assert (result.exit_code, result.stderr) == (0, "")
    (line,) = result.stdout.splitlines()
    assert re.fullmatch(r"[A-Za-z0-9_.,:+ -]+", line)  # so `$(...)` passes on the words that a user sees, whatever the shell
    entries = parsed(line)
    assert entries == plugin.overrides(plan)
    assert entries["architectures"] == ["ZigzagForCausalLM"]
    with_experts = parsed(vllm_args(tmp_path / "plan.json", "--experts").stdout)
    assert with_experts == entries | {"architectures": ["ZigzagMoEForCausalLM"]}
    back = plugin.plan_of(config(plan, **entries))
    assert (back.kinds, back.sink, back.window) == (plan.kinds, plan.sink, plan.window)
    assert [back.size(layer) for layer in range(back.num_layers)] == [plan.size(layer) for layer in range(plan.num_layers)]


def test_the_geometry_travels_too():
    scores = zz.solve([[0.9, 0.9], [0.1, 0.1]], retrieval_ratio=0.5, config=vars(config(UNIFORM, num_hidden_layers=2)))
    entries = plugin.overrides(scores)
    assert entries[KEY]["kv_heads"] == 2 and entries[KEY]["head_dim"] == 64
    plugin.plan_of(config(scores, **entries))
    with pytest.raises(ValueError, match="the plan is for 2 KV heads of head_dim 64; the model has"):
        plugin.plan_of(config(scores, **entries, num_key_value_heads=4))


def test_the_stop_gap_has_windows_and_says_that_sinks_are_lost(tmp_path):
    UNIFORM.save(tmp_path / "plan.json")
    result = vllm_args(tmp_path / "plan.json", "--stock")
    assert result.exit_code == 0
    kinds = ["full_attention", "sliding_attention"] * 2
    assert parsed(result.stdout) == {"layer_types": kinds, "sliding_window": 16, "use_sliding_window": True}
    (warning,) = result.stderr.splitlines()
    assert warning.startswith("warning: layer_types have no sink tokens: 2 layers lose the first 4 tokens")
    assert "leave it out with --stock" in vllm_args(tmp_path / "plan.json", "--stock", "--experts").stderr
    windows = zz.Plan(["retrieval", "streaming"], sink=0, window=16)
    windows.save(tmp_path / "plan.json")
    assert vllm_args(tmp_path / "plan.json", "--stock").stderr == ""


@pytest.mark.parametrize("plan, message", [
    (zz.Plan.from_heads([[True, False], [True, True]], sink=4, window=16), "layers 0 mix heads of both kinds"),
    (zz.Plan(["retrieval"], sink=4, window=16).with_native([0, None]), "layers 0 keep no keys"),
    (UNIFORM.with_formats("int8", "int4"), "the plan wants kv_format int8, ring_kv_format int4"),
])  # fmt: skip
def test_plans_that_are_not_served(plan, message, tmp_path):
    plan.save(tmp_path / "plan.json")
    result = vllm_args(tmp_path / "plan.json")
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line


def test_a_file_that_is_none(tmp_path):
    assert vllm_args(tmp_path / "none.json").exit_code == 2
    with pytest.raises(TypeError, match="plan must be a zigzag_ext.Plan"):
        plugin.overrides("plan.json")


@pytest.mark.parametrize("change, message", [
    (None, "the config has no zigzag_plan: give vLLM the arguments"),
    ({"layers": ["retrieval", "stream"]}, "layer 1 is 'stream'"),
    ({"layers": ["retrieval", "streaming:4"]}, "layer 1 is 'streaming:4'"),
    ({"layers": ["retrieval", 3]}, "layer 1 is 3"),
    ({"sink": -1}, "sink"),
    ({"windw": 3}, "unknown entries: ['windw']"),
    ({"layers": ["retrieval"] * 3}, "the plan has 3 layers, the model has 4"),
])  # fmt: skip
def test_entries_that_are_no_plan_of_the_model(change, message):
    entries = plugin.overrides(UNIFORM)
    entry = None if change is None else entries[KEY] | change
    with pytest.raises(ValueError, match=re.escape(message)):
        plugin.plan_of(config(UNIFORM, **{KEY: entry}))


def test_a_plan_without_its_sizes():
    with pytest.raises(ValueError, match="zigzag_plan lacks sink, window"):
        plugin.plan_of(config(UNIFORM, **{KEY: {"layers": ["retrieval"] * 4}}))


def test_a_plan_for_other_windows_is_refused():
    with pytest.raises(ValueError, match="layer 0 has a native window of 65 in the model, a native window of 64 in the plan"):
        plugin.plan_of(config(NATIVE, **plugin.overrides(NATIVE) | {"sliding_window": 65}))


def vllm_config(**changed) -> SimpleNamespace:
    """What `refusal` looks at; the names are compared with vLLM's own in test_vllm_refusals.py."""
    text = SimpleNamespace(architectures=["ZigzagForCausalLM"])
    fields = {
        "model_config": SimpleNamespace(hf_text_config=text, hf_config=text, dtype="torch.bfloat16", is_moe=False, use_mla=False),
        "cache_config": SimpleNamespace(cache_dtype="auto"),
        "parallel_config": SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        "scheduler_config": SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        "speculative_config": None,
        "kv_transfer_config": None,
    }
    for path, value in changed.items():
        name, _, field = path.partition("__")
        fields[name] = SimpleNamespace(**vars(fields[name]) | {field: value}) if field else value
    return SimpleNamespace(**fields)


@pytest.mark.parametrize("changed, named", [
    ({}, None),
    ({"cache_config__cache_dtype": "bfloat16"}, None),
    ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
    ({"speculative_config": object()}, "speculative decoding"),
    ({"kv_transfer_config": object()}, "KV connectors"),
    ({"parallel_config__decode_context_parallel_size": 2}, "decode context parallelism"),
    ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context parallelism"),
    ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
    ({"model_config__hf_config": SimpleNamespace(architectures=None)}, "models of text and images"),
    ({"model_config__is_moe": True}, "mixtures of experts but by `zigzag vllm-args --experts`"),
    ({"model_config__hf_config": SimpleNamespace(architectures=["ZigzagMoEForCausalLM"])}, "--experts for models without any"),
    ({"model_config__use_mla": True}, "latent attention"),
    ({"model_config__hf_text_config": SimpleNamespace(num_kv_shared_layers=2)}, "layers that read the KV cache of others"),
])  # fmt: skip
def test_what_would_drop_sinks_is_refused_by_name(changed, named):
    reason = refusal(vllm_config(**changed))
    assert reason is None if named is None else named in reason


@pytest.mark.parametrize("version, served", [("0.32.0", True), ("0.32.1+cpu", True), ("0.33.0", False), ("1.32.0", False)])
def test_versions(version, served):
    reason = plugin.unsupported(version)
    assert (reason is None) == served
    assert served or ("tested with vLLM 0.32" in reason and version in reason)
