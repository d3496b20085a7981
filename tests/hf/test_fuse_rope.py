"""RoPE moves from the traced graph of a decode step into the attention ops, wherever it has the form that they compute."""

import pytest
import torch
import torch._inductor.compile_fx as inductor
from tiny_models import generate, new_model, padded_prompt, prompt

import zigzag_ext as zz
from zigzag_ext.hf import compiled

PLAN = zz.Plan(["streaming", "retrieval"] * 2, sink=4, window=16)
HEADS = zz.Plan(["streaming", ("retrieval", "streaming"), ("streaming", "retrieval"), "retrieval"], sink=4, window=16)


@pytest.fixture
def fused(monkeypatch):
    """Ops rewritten, one number per compilation; graphs run as they are traced, without inductor."""
    counts, fuse = [], compiled.fuse_rope
    monkeypatch.setattr(compiled, "fuse_rope", lambda graph: counts.append(fuse(graph)))
    monkeypatch.setattr(inductor, "compile_fx", lambda module, inputs, **options: module.forward)
    return counts


def both_ways(model, plan=PLAN):
    """Tokens of eager steps and of compiled ones."""
    batch = padded_prompt([30, 11])
    with zz.zigzag(model, plan):
        eager = generate(model, 40, **batch)
    with zz.zigzag(model, plan, max_len=80, compile=True):
        return eager, generate(model, 40, **batch)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "gpt_neox", "olmo2"])
def test_rotated_halves_are_fused(fused, family):
    """With norms before (qwen3), on some dims only (gpt_neox), in float32 with a cast behind (olmo2)."""
    eager, steps = both_ways(new_model(family))
    assert steps.equal(eager) and fused == [4]


@pytest.mark.parametrize("family", ["cohere", "glm", "opt"])
def test_other_forms_stay_in_the_graph(fused, family):
    """Interleaved pairs; no RoPE at all."""
    eager, steps = both_ways(new_model(family))
    assert steps.equal(eager) and fused == [0]


@pytest.mark.parametrize("dims, expected", [(64, 4), (40, 4), (12, 0)])
def test_partial_rotation_in_whole_vectors(fused, dims, expected):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": dims / 64}
    eager, steps = both_ways(new_model("gpt_neox", rope_parameters=rope))
    assert steps.equal(eager) and fused == [expected]


def test_both_calls_of_a_mixed_layer_rotate(fused):
    eager, steps = both_ways(new_model("llama"), HEADS)
    assert steps.equal(eager) and fused == [2 + 2 * 2]


@pytest.mark.parametrize("scale, expected", [(1.0, 4), (0.9, 0)])
def test_a_key_of_another_scale_is_not_fused(fused, monkeypatch, scale, expected):
    """What the model does to a key after its RoPE must happen: only q would be rotated by the op."""
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb

    def scaled(q, k, cos, sin, **options):
        q, k = rotate(q, k, cos, sin, **options)
        return q, k if scale == 1 else k * scale

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", scaled)
    eager, steps = both_ways(new_model("llama"))
    assert steps.equal(eager) and fused == [expected]


def test_bfloat16(fused):
    """Tables in bfloat16, as the model makes them: other bits than eager ones, no further from float32."""
    model, token = new_model("llama").bfloat16(), prompt(1, seed=2)

    def logits(model, **options):
        cache = zz.ZigzagCache(model.config, PLAN, max_len=64)
        with zz.zigzag(model, PLAN, **options), torch.no_grad():
            model(prompt(30), past_key_values=cache)
            return model(token, past_key_values=cache).logits.float()

    eager, step, exact = logits(model), logits(model, compile=True), logits(model.float())
    assert fused == [4] and not step.equal(eager)
    assert (step - exact).norm() < 1.5 * (eager - exact).norm()
