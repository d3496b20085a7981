"""RoPE moves from the traced graph of a decode step into the attention ops, wherever it has the form that they compute."""

import pytest
import torch
import torch._inductor.compile_fx as inductor
from tiny_models import generate, new_model, padded_prompt, prompt

import zigzag_ext as zz
from zigzag_ext.hf import compiled

PLAN = zz.Plan(["streaming", "retrieval"], sink=4, window=16)
TWO = {"num_hidden_layers": PLAN.num_layers}  # a compilation takes longer with every layer
HEADS = zz.Plan(["streaming", ("retrieval", "streaming"), ("streaming", "retrieval"), "retrieval"], sink=4, window=16)


@pytest.fixture
def fused(monkeypatch):
    """Ops rewritten, one number per compilation; graphs run as they are traced, without inductor."""
    counts, fuse = [], compiled.fuse_rope
    monkeypatch.setattr(compiled, "fuse_rope", lambda graph: counts.append(fuse(graph)))
    monkeypatch.setattr(inductor, "compile_fx", lambda module, inputs, **options: module.forward)
    return counts


def both_ways(model, plan=PLAN, new_tokens=40):
    """Tokens of eager steps and of compiled ones."""
    batch = padded_prompt([30, 11])
    with zz.zigzag(model, plan):
        eager = generate(model, new_tokens, **batch)
    with zz.zigzag(model, plan, max_len=80, compile=True):
        return eager, generate(model, new_tokens, **batch)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "gpt_neox", "olmo2"])
def test_rotated_halves_are_fused(fused, family):
    """With norms before (qwen3), on some dims only (gpt_neox), in float32 with a cast behind (olmo2)."""
    eager, steps = both_ways(new_model(family, **TWO))
    assert steps.equal(eager) and fused == [2]


@pytest.mark.parametrize("family", ["cohere", "glm", "opt"])
def test_other_forms_stay_in_the_graph(fused, family):
    """Interleaved pairs; no RoPE at all."""
    eager, steps = both_ways(new_model(family, **TWO))
    assert steps.equal(eager) and fused == [0]


@pytest.mark.parametrize("dims, expected", [(64, 2), (40, 2), (12, 0)])
def test_partial_rotation_in_whole_vectors(fused, dims, expected):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": dims / 64}
    eager, steps = both_ways(new_model("gpt_neox", rope_parameters=rope, rotary_pct=dims / 64, **TWO))  # 5.4 reads the latter
    assert steps.equal(eager) and fused == [expected]


def test_both_calls_of_a_mixed_layer_rotate(fused):
    eager, steps = both_ways(new_model("llama"), HEADS)
    assert steps.equal(eager) and fused == [2 + 2 * 2]


def scaled(rotate, q, k, cos, sin):
    q, k = rotate(q, k, cos, sin)
    return q, k * 0.9


def scaled_in_place(rotate, q, k, cos, sin):
    q, k = rotate(q, k, cos, sin)
    k.mul_(0.9)
    return q, k


def scaled_in_a_view(rotate, q, k, cos, sin):
    q, k = rotate(q, k, cos, sin)
    k[..., :8] *= 0.5
    return q, k


def overwritten_later(rotate, q, k, cos, sin):
    rotated = rotate(q, k, cos, sin)
    q.zero_()
    return rotated


def tables_overwritten_later(rotate, q, k, cos, sin):
    rotated = rotate(q, k, cos, sin)
    cos.add_(0.01)
    return rotated


def of_other_tables(rotate, q, k, cos, sin):
    return rotate(q, k, cos, sin)[0], rotate(q, k, sin, cos)[1]


def of_strided_heads(rotate, q, k, cos, sin):
    return rotate(torch.stack([q, q], -1)[..., 0], k, cos, sin)


def of_misaligned_heads(rotate, q, k, cos, sin):
    return rotate(torch.nn.functional.pad(q, (1, 0))[..., 1:], k, cos, sin)


def of_strided_tables(rotate, q, k, cos, sin):
    return rotate(q, k, torch.stack([cos, cos], -1)[..., 0], sin)


def of_repeated_rows(rotate, q, k, cos, sin):
    """One row of queries, rotated for the positions of each row of the batch."""
    return rotate(q[:1], k, cos, sin)


def joined_by_keyword(rotate, q, k, cos, sin):
    q, k = rotate(q, k, cos, sin)
    return torch.cat(tensors=(q[..., :8], q[..., 8:]), dim=-1), k


def twice(rotate, q, k, cos, sin):
    return rotate(*rotate(q, k, cos, sin), cos, sin)


def plain(rotate, q, k, cos, sin):
    return rotate(q, k, cos, sin)


OTHERS = [scaled, scaled_in_place, scaled_in_a_view, overwritten_later, tables_overwritten_later, of_other_tables]
OTHERS += [of_strided_heads, of_misaligned_heads, of_strided_tables, of_repeated_rows, joined_by_keyword]


@pytest.mark.parametrize("rope, expected", [(plain, 1), (twice, 1), *((rope, 0) for rope in OTHERS)])
def test_what_surrounds_the_rotation_happens(fused, monkeypatch, rope, expected):
    """Whatever else a model does to q, k or the tables, compiled steps do too: otherwise its RoPE stays in the graph."""
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, cos, sin, **_: rope(rotate, q, k, cos, sin))
    eager, steps = both_ways(new_model("llama", num_hidden_layers=1), zz.Plan(["retrieval"], sink=0, window=1), new_tokens=8)
    assert steps.equal(eager) and fused == [expected]


def test_bfloat16(fused):
    """Tables in bfloat16, as the model makes them: other bits than eager ones, no further from float32."""
    model, token = new_model("llama", **TWO).bfloat16(), prompt(1, seed=2)

    def logits(model, **options):
        cache = zz.ZigzagCache(model.config, PLAN, max_len=64)
        with zz.zigzag(model, PLAN, **options), torch.no_grad():
            model(prompt(30), past_key_values=cache)
            return model(token, past_key_values=cache).logits.float()

    eager, step, exact = logits(model), logits(model, compile=True), logits(model.float())
    assert fused == [2] and not step.equal(eager)
    assert (step - exact).norm() < 1.5 * (eager - exact).norm()
