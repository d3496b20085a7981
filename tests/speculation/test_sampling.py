"""Sampled speculative decoding has the distribution of plain sampling, whatever is drafted."""

import itertools

import pytest
import torch
from tiny_models import new_model

import zigzag_ext as zz
from zigzag_ext.speculation import Report

VOCAB, NEW = 6, 3
PLAN = zz.Plan(["streaming", "retrieval"], sink=1, window=4)
WARPERS = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 1.7},
    "top_k": {"top_k": 3, "temperature": 1.3},
    "top_p": {"top_k": 0, "top_p": 0.7, "temperature": 2.0},
    "penalty": {"top_k": 0, "repetition_penalty": 2.0},  # looks at the tokens before
}
PROMPT = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 5, 4, 1, 2]])


@pytest.fixture(scope="module")
def model():
    with zz.zigzag(new_model("llama", vocab_size=VOCAB, num_hidden_layers=2, initializer_range=0.05), PLAN, rollback=3) as model:
        yield model


def exact(model, options) -> torch.Tensor:
    """[VOCAB ** NEW] probabilities of all continuations, by one forward and the processors of generate() for each of them."""
    config = model.generation_config
    sequences = torch.tensor(list(itertools.product(range(VOCAB), repeat=NEW)))
    ids = torch.cat([PROMPT.expand(len(sequences), -1), sequences], 1)
    with torch.no_grad():
        logits = model(ids).logits[:, PROMPT.shape[1] - 1 : -1]
    config = type(config)(**config.to_dict() | options | {"do_sample": True})
    processors = model._get_logits_processor(config, input_ids_seq_length=PROMPT.shape[1], device="cpu")
    total = torch.ones(len(sequences))
    for step in range(NEW):
        scores = processors(ids[:, : PROMPT.shape[1] + step], logits[:, step].clone())
        total *= scores.softmax(-1).gather(1, sequences[:, step : step + 1])[:, 0]
    return total


def distance(model, options, draft, draws, expected) -> tuple[float, Report]:
    """Total variation between `draws` samples and the expected distribution."""
    torch.manual_seed(0)
    seen, speculation = torch.zeros(VOCAB**NEW), None
    place = VOCAB ** torch.arange(NEW - 1, -1, -1)
    for _ in range(draws // 500):
        speculation = zz.speculate(draft=draft, tokens=3, window=2, min_match=1)
        ids = model.generate(
            PROMPT.expand(500, -1), attention_mask=torch.ones(500, PROMPT.shape[1]), do_sample=True, max_new_tokens=NEW,
            eos_token_id=None, pad_token_id=0, custom_generate=speculation, **options,
        )  # fmt: skip
        seen += (ids[:, PROMPT.shape[1] :] * place).sum(1).bincount(minlength=VOCAB**NEW)
    return float((seen / draws - expected).abs().sum() / 2), speculation.report


def noise(expected, draws) -> float:
    """The mean distance of as many samples of the expected distribution itself."""
    return float((expected * (1 - expected) * 2 / torch.pi / draws).sqrt().sum() / 2)


@pytest.mark.parametrize("draft", ["lookup", "streaming"])
@pytest.mark.parametrize("warper", WARPERS)
def test_the_distribution_of_three_tokens(model, warper, draft, request):
    draws = 20_000 if request.config.getoption("--long") else 2_000
    expected = exact(model, WARPERS[warper])
    assert expected.sum() == pytest.approx(1, abs=1e-4)
    found, report = distance(model, WARPERS[warper], draft, draws, expected)
    usual = noise(expected, draws)
    assert found < 1.35 * usual + 0.002, f"{found:.4f}, {usual:.4f} is expected"
    assert 0 < report.accepted[draft] < report.drafted[draft]


def test_the_distance_tells_another_distribution(model):
    """Samples at another temperature do not meet the bound."""
    expected = exact(model, WARPERS["plain"])
    found, _ = distance(model, {"top_k": 0, "temperature": 0.5}, "lookup", 2_000, expected)
    assert found > 1.35 * noise(expected, 2_000) + 0.002


def test_seeds_repeat(model):
    options = {"attention_mask": torch.ones_like(PROMPT), "do_sample": True, "max_new_tokens": 12, "eos_token_id": None}
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(model.generate(PROMPT, **options, pad_token_id=0, custom_generate=zz.speculate(draft="streaming", window=2)))
    assert runs[0].equal(runs[1])
