"""The C++ example, compiled against the package's own library: what it prints for a saved plan equals dense attention."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import zigzag_ext as zz

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "cpp"
BATCH, GROUP, KV_HEADS, HEAD_DIM = 2, 4, 2, 64
PLAN = zz.Plan(
    ["retrieval", "streaming", ["streaming", "retrieval"], "streaming"],
    sink=2,
    window=5,
    provenance={"é": ["\n", 1.5], "origin": {"model": "org/é", "layers": 4, "kv_heads": 2}},
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    target, package = tmp_path_factory.mktemp("example") / "decode_step", Path(zz.__file__).parent
    options = ["-std=c++17", "-pthread", f"-I{ROOT / 'csrc'}", "-DZIGZAG_WITH_CUDA=0", f"-L{package}", "-lzigzag_core"]
    sources = sorted(map(str, FOLDER.glob("*.cpp")))
    subprocess.run([compiler, *sources, *options, f"-Wl,-rpath,{package}", "-o", str(target)], check=True)
    return target


def run(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)


def generate(layer, tensor, position, count):
    """The example's numbers: `generate` of decode_step.cpp."""
    with np.errstate(over="ignore"):
        seed = np.uint32(position) + np.uint32(0x85EBCA6B) * np.uint32(tensor + 8 * layer + 1)
        x = np.arange(count, dtype=np.uint32) + np.uint32(0x9E3779B9) * seed
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
    return (x ^ x >> np.uint32(16)) >> np.uint32(8)


def tensor(layer, which, position, heads):
    numbers = generate(layer, which, position, BATCH * heads * HEAD_DIM) / 8388608.0 - 1.0
    return numbers.reshape(BATCH, heads, HEAD_DIM).astype(np.float64)


def expected(plan, tokens):
    """Outputs of the last layer per token, [tokens][batch, query heads, head_dim], over every key that a head still sees."""
    retrieves, outputs = plan.retrieval_heads(KV_HEADS), []
    new = [[[tensor(layer, which, p, KV_HEADS) for p in range(tokens)] for which in (1, 2)] for layer in range(plan.num_layers)]
    for position in range(tokens):
        x = tensor(0, 0, position, KV_HEADS * GROUP)
        for layer in range(plan.num_layers):
            out = np.empty_like(x)
            for head in range(KV_HEADS):
                own = slice(head * GROUP, (head + 1) * GROUP)
                near = range(position + 1)
                seen = [p for p in near if retrieves[layer][head] or p < plan.sink or position - p < plan.window]
                k, v = (np.stack([new[layer][which][p][:, head] for p in seen], 1) for which in (0, 1))
                logits = np.einsum("bgd,bkd->bgk", x[:, own], k) / np.sqrt(HEAD_DIM)
                weights = np.exp(logits - logits.max(-1, keepdims=True))
                out[:, own] = np.einsum("bgk,bkd->bgd", weights / weights.sum(-1, keepdims=True), v)
            x = out
        outputs.append(x)
    return outputs


def printed(done):
    assert done.returncode == 0, done.stderr
    return np.array([[float(x) for x in line.split(": ")[1].split()] for line in done.stdout.splitlines()[1:]])


def test_decodes_a_saved_plan(program, tmp_path):
    PLAN.save(tmp_path / "plan.json")
    done = run(program, tmp_path / "plan.json", "cpu", 30)
    numbers = printed(done)
    reference = np.stack([out[1, 0, :4] for out in expected(PLAN, 30)])
    assert numbers.shape == (30, 4) and np.abs(numbers - reference).max() < 2e-5
    scheduler = zz._C.Scheduler(PLAN.kinds, 2, 5, KV_HEADS * GROUP, KV_HEADS, HEAD_DIM, "float32")
    first = done.stdout.splitlines()[0]
    assert f"layers RSMS, 5 launches a step, {scheduler.kv_bytes(2, 256)} bytes" in first


def test_formats_of_the_plan_are_used(program, tmp_path):
    quantised = zz.Plan(PLAN.kinds, sink=2, window=5, kv_format="int8/fp8", ring_kv_format="int8")
    quantised.save(tmp_path / "plan.json")
    error = np.abs(printed(run(program, tmp_path / "plan.json", "cpu", 30)) - np.stack([o[1, 0, :4] for o in expected(PLAN, 30)]))
    assert 1e-5 < error.max() < 0.05


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.json"], "there is no plan file at missing.json"),
        ([FOLDER / "README.md"], "README.md is not a usable plan file: it is not JSON: expected a value at byte 0"),
        ([FOLDER / "plan.json", "tpu"], "the device is cpu or cuda, got tpu"),
        ([FOLDER / "plan.json", "cpu", 1000], "TOKENS must lie in [1, 256], got 1000"),
        ([FOLDER / "plan.json", "cuda"], "built without CUDA"),
    ],
)
def test_errors_are_one_line(program, arguments, message):
    done = run(program, *arguments)
    assert done.returncode == 1 and message in done.stderr and re.fullmatch(r"error: [^\n]*\n", done.stderr)
