"""A model on several devices: layers spread over two GPUs, as `device_map` does."""

import copy

import pytest
import torch
from tiny_models import NUM_LAYERS, generate, new_model, padded_prompt

import zigzag_ext as zz

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

KINDS = ["streaming", "retrieval"] * 2
PLANS = {
    "layers": zz.Plan(KINDS, sink=4, window=16),
    "heads": zz.Plan(["streaming", ["retrieval", "streaming"], ["streaming", "retrieval"], "retrieval"], sink=4, window=16),
    "int8": zz.Plan(KINDS, sink=4, window=16, kv_format="int8", ring_kv_format="int8"),
}


def spread(model):
    """A copy with its first half on cuda:0 and the rest on cuda:1; activations move between them by accelerate's hooks."""
    from accelerate import dispatch_model

    layers = {f"model.layers.{layer}": int(layer >= NUM_LAYERS // 2) for layer in range(NUM_LAYERS)}
    ends = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    return dispatch_model(copy.deepcopy(model), device_map={**ends, **layers}, main_device="cuda:0")


@pytest.fixture(scope="module")
def models():
    one = new_model("llama").to("cuda:0", torch.bfloat16)
    return one, spread(one)


@needs_two_gpus
@pytest.mark.parametrize("lengths", [[100], [90, 37, 5]], ids=["single", "left_padded"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("prefill_chunk", [None, 37, "auto"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_two_gpus_give_the_tokens_of_one(models, plan, prefill_chunk, options, lengths):
    batch, answers = padded_prompt(lengths), []
    for model in models:
        with zz.zigzag(model, plan, prefill_chunk=prefill_chunk):
            inputs = {name: tensor.to("cuda:0") for name, tensor in batch.items()}
            answers.append(generate(model, 60, **inputs, **options).cpu())
    assert torch.equal(*answers)


@needs_two_gpus
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_two_gpus_compress_a_prompt_as_one_does(models, plan):
    """Lengths of layers are lowered on both."""
    batch, method, found = padded_prompt([190, 37, 120]), zz.PromptWindows(budget=60, window=4, observe=8), []
    for model in models:
        with zz.zigzag(model, plan, compress=method):
            cache = zz.ZigzagCache(model.config, plan, compress=method)
            inputs = {name: tensor.to("cuda:0") for name, tensor in batch.items()}
            tokens = generate(model, 20, **inputs, past_key_values=cache).cpu()
            found.append((tokens, cache.compressed, [lengths.cpu() for lengths in cache.state.seq_lens.values()]))
    assert found[0][0].equal(found[1][0]) and found[0][1] == found[1][1] and found[0][1]
    assert len(found[1][2]) == 2 and all(lengths.equal(found[0][2][0]) for lengths in found[1][2])


@needs_two_gpus
def test_each_cache_lives_with_its_layer(models):
    model = models[1]
    cache = zz.ZigzagCache(model.config, PLANS["layers"], max_len=256)
    with zz.zigzag(model, PLANS["layers"]):
        for _ in range(2):  # the second time on the memory of the first
            generate(model, 5, padded_prompt([50])["input_ids"].to("cuda:0"), past_key_values=cache)
            assert [layer.keys.device.index for layer in cache.layers] == [0, 0, 1, 1]
            cache.reset()


@needs_two_gpus
def test_compiled_steps_are_refused(models):
    with pytest.raises(ValueError, match="whole model on one device, it is on cuda:0, cuda:1"):
        zz.enable(models[1], PLANS["layers"], compile=True)
