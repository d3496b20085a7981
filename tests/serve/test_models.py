"""The engine gives what generate() gives with the same plan, for every kind of model and layer that it serves."""

import pytest
import torch
import transformers
from driving import GAPS, Choices, driven, ids_of, near_ties, plan_of
from gpu import needs_cuda
from tiny_models import FAMILIES, HYBRID, SHARED, WINDOWED, new_model, shared_model, windowed_model
from transformers import AutoModelForImageTextToText, Qwen2VLConfig

import zigzag_ext as zz
from zigzag_ext.attention import routes
from zigzag_ext.cache import states

LENGTHS, NEW = (5, 70, 33, 150, 1, 17), 8
# One of each trait: positions of its own, soft caps, learned sinks, experts, norms of queries, windows, shared caches.
SOME = {
    **{
        family: (new_model, {})
        for family in ("llama", "gpt2", "gpt_neox", "opt", "phi3", "mixtral", "qwen3", "stablelm", "smollm3")
    },
    **{
        f"windowed {family}": (windowed_model, {"window": 16})
        for family in ("gemma2", "gpt_oss", "cohere2", "ministral3", "qwen2")
    },
    **{f"shared {family}": (shared_model, {"window": 16}) for family in SHARED},
}
LONG = {
    **{family: (new_model, {}) for family in FAMILIES},
    **{f"windowed {family}": (windowed_model, {"window": 16}) for family in WINDOWED},
}


def pytest_generate_tests(metafunc):
    if "named" in metafunc.fixturenames:
        metafunc.parametrize("named", SOME | (LONG if metafunc.config.getoption("--long") else {}))


def compare(model, plan, gap: float = GAPS["none"], formats: dict | None = None, most_ties: int = 1, **options) -> None:
    """Requires the tokens of generate(), which reads each prompt in one piece, but where its two best logits are within `gap`."""
    formats, greedy = formats or {}, {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = []
    with zz.zigzag(model, plan, prefill_chunk=None, **formats):
        for length in LENGTHS:
            ids = torch.tensor([ids_of(length)], device=model.device)
            done = model.generate(ids, **greedy, return_dict_in_generate=True, output_logits=True)
            best = torch.stack(done.logits)[:, 0].topk(2).values
            alone.append(Choices(done.sequences[0, length:].tolist(), (best[:, 0] - best[:, 1]).tolist()))
    tokens = served(model, plan, **formats, **options)
    assert all(len(row) == NEW for row in tokens)
    ties = sum(near_ties(row, wanted, gap) for row, wanted in zip(tokens, alone, strict=True))
    assert ties <= most_ties, f"{ties} of {len(LENGTHS)} requests differ at a near tie"


def served(model, plan, **options) -> list[list[int]]:
    """Tokens of prompts that come one step after the other, to three rows."""
    with driven(model, plan, **options) as driver:
        requests = []
        for length in LENGTHS:
            requests.append(driver.submit(ids_of(length), zz.Sampling(NEW, ignore_eos=True)))
            driver.step()
        driver.drain()
        return [request.result(0).token_ids for request in requests]


def test_a_model_gives_what_generate_gives(named):
    make, options = (SOME | LONG)[named]
    model = make(named.split()[-1], **options)
    before = set(vars(model))
    compare(model, None, prefill_chunk=40)
    assert set(vars(model)) == before and model.config._attn_implementation != "zigzag"


@pytest.mark.parametrize("chunk", [7, 16, 17, "auto"])
@pytest.mark.parametrize("kv_format", ["none", "int8", "int4", "fp8"])
def test_a_plan_gives_what_generate_gives(kv_format, chunk):
    compare(new_model("llama"), plan_of(kv_format), GAPS[kv_format], prefill_chunk=chunk)


@pytest.mark.parametrize(
    "plan",
    [
        zz.Plan([("retrieval", "streaming"), "streaming", ("streaming", "retrieval"), "retrieval"], sink=4, window=20),
        zz.Plan(["streaming"] * 4, sink=4, window=20),
        plan_of("int8", key_smoothing=True),
        zz.Plan(["retrieval", "streaming"] * 2, sink=0, window=1),
    ],
    ids=["mixed heads", "all streaming", "smoothed keys", "window of one"],
)
def test_plans_of_every_kind_give_what_generate_gives(plan):
    compare(new_model("llama"), plan, GAPS[plan.kv_format.k], prefill_chunk=128)


@pytest.mark.parametrize("kv_format", ["none", "int8"])
def test_backends_of_other_libraries_read_prompts_of_a_row(kv_format, monkeypatch):
    calls, attend = [], routes._attend_by
    monkeypatch.setenv(routes.ENVIRONMENT, "torch_cpu")
    monkeypatch.setattr(routes, "_attend_by", lambda *arguments: calls.append(arguments) or attend(*arguments))
    compare(new_model("llama"), plan_of(kv_format), GAPS[kv_format], prefill_chunk=40)
    full_batch = {len(arguments[4].keys) for arguments in calls}
    assert full_batch == {1} and len(calls) > 2 * 10  # two layers; chunks of more than 16 tokens


@needs_cuda
@pytest.mark.parametrize("rows", [3, 100])  # of 100 rows of this model kernels are not expected to read ahead, of a few they are
@pytest.mark.parametrize("kv_format", ["none", "int8"])
def test_a_gpu_gives_what_generate_gives(kv_format, rows):
    model = new_model("llama").to("cuda", torch.bfloat16)
    compare(model, plan_of(kv_format), 0.25, most_ties=3, max_rows=rows, prefill_chunk=24)


def test_formats_of_the_engine_take_the_place_of_the_plans():
    formats = {"kv_format": {"k": "int8", "v": "int4"}, "ring_kv_format": "fp8", "key_smoothing": True}
    compare(new_model("llama"), plan_of(), GAPS["int4"], formats)


@pytest.mark.skipif(not states.SERVED, reason=f"transformers {transformers.__version__} has no classes for states")
@pytest.mark.parametrize("family", list(HYBRID)[:3])
def test_layers_with_states_are_refused_by_name(family):
    model = new_model(family)
    before = set(vars(model))
    with pytest.raises(ValueError, match=rf"{model.config.model_type} is not served by zz.Engine: layers \[.*\] keep states"):
        zz.Engine(model, max_len=100)
    assert set(vars(model)) == before and model.config._attn_implementation != "zigzag"


def test_what_cannot_be_served_row_by_row_is_refused_by_name():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(
        ValueError, match="llama is not served by zz.Engine: the frequencies of 'dynamic' RoPE .* the longest row"
    ):
        zz.Engine(new_model("llama", rope_parameters=rope), max_len=100)
    text = {
        "num_hidden_layers": 1,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 8,
    }
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 128}
    model = AutoModelForImageTextToText.from_config(Qwen2VLConfig(text_config=text, vision_config=vision))
    with pytest.raises(ValueError, match="qwen2_vl is not served by zz.Engine: it is an image-text model"):
        zz.Engine(model, max_len=100)


def test_a_model_that_fails_leaves_no_engine():
    model = new_model("llama")
    handle = model.model.layers[2].register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        zz.Engine(model, plan_of(), max_len=100)
    handle.remove()
    compare(model, plan_of())


def test_a_model_that_is_moved_while_it_is_served_fails_by_name():
    with driven(new_model("llama"), plan_of()) as driver:
        driver.engine.model.to(torch.bfloat16)
        request = driver.submit(ids_of(9), zz.Sampling(2))
        driver.drain()
        with pytest.raises(ValueError, match="layer 0 gives bfloat16 keys on cpu, its rows are float32 on cpu: leave the model"):
            request.result(0)
        driver.engine.model.to(torch.float32)
        again = driver.submit(ids_of(9), zz.Sampling(2))
        driver.drain()
        assert len(again.result(0).token_ids) == 2


BAD = {
    "max_rows must be 1 to 1024, got 0": {"max_rows": 0},
    "max_len must be 1 to 1073741824, got 0": {"max_len": 0},
    "queue must be 1 to": {"queue": 0},
    "max_stall_ms must be a number of milliseconds above 0, got 0": {"max_stall_ms": 0},
    r"memory must be a share above 0 and up to 1.0, or .*; got 1.5": {"memory": 1.5},
    "memory must be a share .* got True": {"memory": True},
    "the rings of 32 rows take 1,572,864 bytes, memory=1000 allows 1,000: give fewer max_rows": {"memory": 1000},
    "1 bytes are left for keys and values, a row of one token takes 16,384": {"memory": 1572865},
    "prefill_chunk must be a number of tokens or 'auto', got None": {"prefill_chunk": None},
    "compile must be True, False or None, got 'yes'": {"compile": "yes"},
    "prefix_cache must be True or False, got 1": {"prefix_cache": 1},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options_are_named_and_leave_the_model_alone(message):
    model = new_model("llama")
    with pytest.raises((TypeError, ValueError), match=message):
        zz.Engine(model, plan_of(), **{"max_len": 100} | BAD[message])
    zz.disable(zz.enable(model))


def test_an_enabled_model_is_refused_and_stays_enabled():
    model = zz.enable(new_model("llama"), plan_of())
    with pytest.raises(RuntimeError, match="already enabled on this model"):
        zz.Engine(model, max_len=100)
    zz.disable(model)
