"""Identification: every method gives what its definition says, the same bits from a seed, and resumes to the same bits."""

import re
import string
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import zigzag_ext as zz
from zigzag_ext.attention.reference import visible
from zigzag_ext.study.identify import METHODS, data
from zigzag_ext.study.identify.method import weights_of

from .conftest import KV_HEADS, LAYERS

SMALL = {"sink": 4, "window": 32, "tokens": 1600, "prompts": 3}
LONG = {"tokens": 2400}  # for gates, whose shortest prompts are half as long
CASES = [(name, LONG if name == "gates" else {}) for name in METHODS]
CASES += [("ablation", {"level": "head"}), ("gates", {"level": "layer", "batch": 2, **LONG})]
IDS = [f"{name}-{options.get('level', 'default')}" for name, options in CASES]
Q_HEADS = 4


@pytest.mark.parametrize("method,options", CASES, ids=IDS)
def test_scores_are_a_matrix_in_range_the_same_bits_again_and_readable(model, tokenizer, tmp_path, method, options):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = []
    path = tmp_path / "scores.tsv"
    scores = zz.identify(model, tokenizer, method, output=path, advance=lambda *at: steps.append(at), **SMALL | options)
    assert scores.shape == (LAYERS, KV_HEADS) and scores.dtype == np.float64
    assert scores.min() >= 0 and scores.max() <= 1 and len(np.unique(scores)) > 1
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1] == len(steps) - 1
    zz.identify(model, tokenizer, method, output=tmp_path / "again.tsv", **SMALL | options)
    assert (tmp_path / "again.tsv").read_bytes() == path.read_bytes()
    seeds = (3, 4, 5, 6) if method == "greedy" else (3,)  # greedy's scores are one of six orders of three layers
    others = [zz.identify(model, tokenizer, method, **SMALL | options | {"seed": seed}) for seed in seeds]
    assert not all(np.array_equal(scores, other) for other in others)
    assert np.array_equal(scores, zz.load_scores(path)) and {file.name for file in tmp_path.iterdir()} == {
        "scores.tsv",
        "again.tsv",
    }
    sizes = {"layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": 64, "query_heads": Q_HEADS}
    assert scores.origin == zz.load_scores(path).origin == {"method": method, **sizes}  # the model was made, not loaded
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("method,options", CASES, ids=IDS)
def test_an_interrupted_run_goes_on_to_the_same_bits(model, tokenizer, tmp_path, method, options):
    path = tmp_path / "scores"  # a DuoAttention folder

    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zz.identify(model, tokenizer, method, output=path, advance=interrupt, **SMALL | options)
    assert not path.exists() and (tmp_path / "scores.partial.npz").exists()
    with pytest.raises(ValueError, match="other arguments"):
        zz.identify(model, tokenizer, method, output=path, **SMALL | options | {"seed": 5})
    steps = []
    resumed = zz.identify(model, tokenizer, method, output=path, advance=lambda *at: steps.append(at), **SMALL | options)
    assert steps[0][0] == 2
    assert np.array_equal(resumed, zz.identify(model, tokenizer, method, **SMALL | options))
    assert np.array_equal(resumed, zz.load_scores(path))


def test_a_damaged_partial_file_is_named(model, tokenizer, tmp_path):
    for content in (b"nonsense", b"PK\x03\x04nonsense", b""):
        (tmp_path / "scores.tsv.partial.npz").write_bytes(content)
        with pytest.raises(ValueError, match="scores.tsv.partial.npz is damaged"):
            zz.identify(model, tokenizer, "lazy", output=tmp_path / "scores.tsv", **SMALL)


def stock_weights(model, ids):
    """Attention weights [layers, num_q_heads, n, n] of transformers' own eager attention."""
    previous = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return torch.stack(model(torch.tensor([ids]), output_attentions=True).attentions)[:, 0]
    finally:
        model.set_attn_implementation(previous)


def numbered(tokenizer, number, tokens=1600, seed=0):
    import random

    return data.sample(tokenizer, tokens, random.Random(f"identify/{seed}/{number}"))


def test_lazy_is_the_mass_outside_sink_and_window(model, tokenizer):
    scores = zz.identify(model, tokenizer, "lazy", **SMALL | {"prompts": 2}, queries=50)
    position = torch.arange(1600)
    seen = visible(position, position[-50:, None], 4, 32)
    masses = [(stock_weights(model, numbered(tokenizer, i).ids)[:, :, -50:] * seen).sum(-1).mean(-1) for i in range(2)]
    expected = 1 - torch.stack(masses).mean(0).unflatten(1, (KV_HEADS, -1)).mean(-1)
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-5)


def test_retrieval_counts_copies(model, tokenizer):
    scores = zz.identify(model, tokenizer, "retrieval", **SMALL | {"prompts": 1})
    sample = numbered(tokenizer, 0)
    weights, hits = stock_weights(model, sample.ids), torch.zeros(LAYERS, Q_HEADS)
    for answer, (start, end) in zip(sample.answers, sample.needles, strict=True):
        for position in answer:
            for layer in range(LAYERS):
                for head in range(Q_HEADS):
                    key = int(weights[layer, head, position - 1].argmax())
                    hits[layer, head] += (start <= key < end and sample.ids[key] == sample.ids[position]) / len(answer)
    expected = (hits / len(sample.answers)).unflatten(1, (KV_HEADS, -1)).amax(-1)
    assert expected.max() > 0
    np.testing.assert_allclose(scores, expected.numpy(), atol=1e-9)


@pytest.mark.parametrize("level", ["layer", "head"])
def test_ablation_compares_with_the_unit_streaming(model, tokenizer, level):
    scores = zz.identify(model, tokenizer, "ablation", level=level, **SMALL | {"prompts": 2})
    samples = [numbered(tokenizer, i) for i in range(2)]
    value = lambda plan: np.mean([verdict.answers for verdict in zz.evaluate.score(model, samples, plan)])  # noqa: E731
    for layer in range(LAYERS):
        for head in range(KV_HEADS):
            retrieval = np.ones((LAYERS, KV_HEADS), bool)
            retrieval[layer, head if level == "head" else slice(None)] = False
            drop = value(None) - value(zz.Plan.from_heads(retrieval, sink=4, window=32))
            assert scores[layer, head] == pytest.approx(1 / (1 + np.exp(-drop)), abs=1e-4)


def test_gates_learn_which_layer_retrieves(tokenizer):
    """Queries of layers 0 and 2 are made so weak near, and values so small far, that only layer 1 minds streaming."""
    torch.manual_seed(0)
    model = _one_retrieval_layer()
    scores = zz.identify(
        model, tokenizer, "gates", level="layer", learning_rate=0.05, regularizer=0.002, **SMALL | LONG | {"prompts": 40}
    )
    assert scores[1, 0] > 0.9 and max(scores[0, 0], scores[2, 0]) < 0.5, scores


def _one_retrieval_layer():
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=KV_HEADS,
        head_dim=64, vocab_size=100, max_position_embeddings=3072, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for layer in (0, 2):  # attention that adds nothing: full or streaming is all the same
        torch.nn.init.zeros_(model.model.layers[layer].self_attn.o_proj.weight)
    return model


def test_gates_need_no_gradient_mode_of_the_caller(model, tokenizer):
    with torch.no_grad():
        zz.identify(model, tokenizer, "gates", **SMALL | LONG | {"prompts": 1})


def test_weights_are_causal_and_sum_to_one():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 30, 8, generator=generator), torch.randn(1, 2, 30, 8, generator=generator)
    weights = weights_of(query, key, torch.tensor([0, 7, 29]), 0.3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 3))
    assert not weights[0, :, 1, 8:].any() and weights[0, :, 0, 0].eq(1).all()


@pytest.fixture(scope="module", params=["characters", "byte-level BPE", "metaspace BPE"])
def any_tokenizer(request, tokenizer):
    """Of single characters, or trained here with the pre-tokenizer of GPT-2, or as SentencePiece splits text."""
    if request.param == "characters":
        return tokenizer
    trained = Tokenizer(models.BPE())
    if request.param == "byte-level BPE":
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        parts = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
        trained.pre_tokenizer = pre_tokenizers.Sequence(parts)
    text = string.printable + data.python_reference()[:50_000]
    trained.train_from_iterator([text], trainers.BpeTrainer(vocab_size=600, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=trained)


def test_prompts_say_every_answer_in_a_needle(any_tokenizer):
    """The same tokens in both places, whatever the tokenizer: the copy score needs them."""
    for number in range(20):
        sample = numbered(any_tokenizer, number)
        assert len(sample.ids) == 1600 and len(sample.answers) == data.NEEDLES * len(data.KINDS)
        for answer, (start, end) in zip(sample.answers, sample.needles, strict=True):
            wanted, needle = [sample.ids[position] for position in answer], list(sample.ids[start:end])
            assert any(needle[i : i + len(wanted)] == wanted for i in range(len(needle)))
            assert end < sample.answers[0][0]


def test_every_prompt_mixes_the_kinds_and_no_answer_is_the_evaluations(tokenizer):
    """Text by text: each kind is asked for by different names, in changing order, and no number has five digits."""
    orders, lengths = set(), set()
    leads = {kind: re.compile(re.escape(kind).replace(r"\{name\}", "([A-Z][a-z]+)")) for kind in data.KINDS}
    for number in range(30):
        sample = numbered(tokenizer, number)
        text = lambda span, ids=sample.ids: "".join(tokenizer.convert_ids_to_tokens(ids[slice(*span)]))  # noqa: E731
        told = [text(span) for span in sample.needles]
        kinds = [next(kind for kind in leads if leads[kind].search(needle)) for needle in told]
        names = [leads[kind].search(needle)[1] for kind, needle in zip(kinds, told, strict=True)]
        assert Counter(kinds) == dict.fromkeys(data.KINDS, data.NEEDLES)
        assert len(set(zip(kinds, names, strict=True))) == len(told)
        for kind, name, answer in zip(kinds, names, sample.answers, strict=True):
            lead = kind.format(name=name)
            assert text((answer[0] - len(lead) - 1, answer[0])).strip() == lead  # asked for by the words that told it
        orders.add(tuple(kinds))
        lengths |= {len(run) for needle in told for run in re.findall(r"\d+", needle)}
    assert len(orders) > 20 and lengths == {3, 4, 6, 7, 8}


def test_a_seed_gives_the_prompts_of_this_version(tokenizer, monkeypatch):
    """Scores of different prompts must not be mixed: whoever changes these also raises `data.VERSION`."""
    monkeypatch.setattr(data, "python_reference", lambda: "Some plain words that stand in for the long reference. " * 50)
    for cached in (data._text, data._plain_runs):
        monkeypatch.setattr(data, cached.__name__, cached.__wrapped__)
    ids = [numbered(tokenizer, number, seed=seed).ids for seed, number in ((0, 0), (0, 1), (1, 0))]
    assert (data.VERSION, zlib.crc32(str(ids).encode())) == (2, 3267837665)


@pytest.mark.parametrize(
    "method,options,named",
    [
        ("magic", {}, "lazy, retrieval, ablation, greedy, gates"),
        ("lazy", {"level": "head"}, "no option level; it has queries"),
        ("retrieval", {"queries": 3}, "it has none"),
        ("lazy", {"queries": 0}, "queries"),
        ("ablation", {"level": "model"}, "'layer' or 'head'"),
        ("gates", {"level": "model"}, "'layer' or 'head'"),
        ("gates", {"learning_rate": 0}, "learning_rate"),
        ("lazy", {"tokens": 36}, "more than 36"),
        ("lazy", {"tokens": 4000}, "context of 3072"),
        ("lazy", {"tokens": 200}, "at least"),
        ("lazy", {"prompts": 0}, "prompts"),
        ("lazy", {"window": 0}, "window"),
    ],
)
def test_impossible_arguments_are_refused(model, tokenizer, method, options, named):
    with pytest.raises(ValueError, match=named):
        zz.identify(model, tokenizer, method, **SMALL | options)
