"""What is refused, by vLLM's own configuration objects: that `refusal` asks them what they have, under the names they have."""

import json
import subprocess
import sys

import pytest
from installed import environment, needs_vllm
from tiny_models import new_model

import zigzag_ext as zz
from zigzag_ext import vllm as plugin

pytestmark = needs_vllm

PLAN = zz.Plan(["retrieval", "streaming"] * 2, sink=20, window=70)
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
CASES = {
    "": {},
    "--kv-cache-dtype fp8": {"kv_cache_dtype": "fp8"},
    "speculative decoding": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3},
    },
    "KV connectors": {"kv_transfer_config": CONNECTOR},
    "KV offloading": {"kv_offloading_size": 1.0},
    "--disable-hybrid-kv-cache-manager": {"disable_hybrid_kv_cache_manager": True},
    "decode context parallelism": {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
    "--experts for models without any": {"hf_overrides": plugin.overrides(PLAN, experts=True)},
}
CONFIGURED = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from zigzag_ext.vllm.plans import refusal

load_general_plugins()
model, overrides, cases = json.load(sys.stdin)
base = {"model": model, "skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32", "hf_overrides": overrides}
print(json.dumps({name: refusal(EngineArgs(**base | case).create_engine_config()) for name, case in cases.items()}))
"""
STARTED = """
import json, sys
from vllm import LLM

model, overrides = json.load(sys.stdin)
LLM(model=model, skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=256, hf_overrides=overrides)
"""


def run(tmp_path, program: str, *given) -> subprocess.CompletedProcess:
    variables = environment(tmp_path / "site") | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, input=json.dumps(given), env=variables, capture_output=True, text=True, timeout=600)


@pytest.fixture
def folder(tmp_path):
    new_model("llama").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.slow
def test_configurations(tmp_path, folder):
    done = run(tmp_path, CONFIGURED, folder, plugin.overrides(PLAN), CASES)
    assert done.returncode == 0, done.stderr[-3000:]
    reasons = json.loads(done.stdout.splitlines()[-1])
    assert reasons.pop("") is None
    assert {name for name, reason in reasons.items() if reason is None or name not in reason} == set()
    assert len(reasons) == len(CASES) - 1


@pytest.mark.slow
@pytest.mark.parametrize("plan, message", [
    (zz.Plan(["retrieval"] * 3, sink=4, window=8), "the plan has 3 layers, the model has 4"),
    (zz.Plan(["native"] * 4, sink=0, window=1, layer_sizes=[(0, 9)] * 4), "layer 0 has full attention in the model"),
])  # fmt: skip
def test_a_plan_for_another_model_stops_the_start(tmp_path, folder, plan, message):
    done = run(tmp_path, STARTED, folder, plugin.overrides(plan))
    assert done.returncode == 1 and f"ValueError: {message}" in done.stderr, done.stderr[-3000:]


@pytest.mark.slow
def test_an_untested_version_is_said_once_and_left_alone(tmp_path, folder):
    program = "from vllm import version; version.__version__ = '0.33.0'\n" + STARTED
    done = run(tmp_path, program, folder, plugin.overrides(PLAN))
    assert done.returncode == 1 and "Model architectures ['ZigzagForCausalLM'] are not supported" in done.stderr
    assert done.stderr.count("zigzag_ext's plugin for vLLM was tested with vLLM 0.32, this is 0.33.0") == 1
