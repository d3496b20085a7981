"""What a verification keeps: greedy against a walk through each row, sampled against exact probabilities."""

import itertools

import pytest
import torch

from zigzag_ext.speculation.accept import accept_greedy, accept_sampled

VOCAB = 4


def emitted(decided, counts):
    """The tokens of each row, as `Decoding` reads them."""
    q_len = decided.shape[1] - 1
    return [row[q_len - n : row[-2]] + row[-1:] for row, n in zip(decided.tolist(), counts, strict=True)]


@pytest.mark.parametrize("q_len", [1, 2, 5])
def test_greedy_keeps_drafts_up_to_the_first_wrong_one(q_len):
    generator = torch.Generator().manual_seed(q_len)
    scores = torch.randn(200, q_len, VOCAB, generator=generator)
    tokens = torch.randint(0, VOCAB, (200, q_len), generator=generator)
    counts = torch.randint(1, q_len + 1, (200,), generator=generator)
    found = emitted(accept_greedy(scores, tokens, counts), counts.tolist())
    for row in range(200):
        best, expected = scores[row].argmax(-1).tolist(), []
        for column in range(q_len - int(counts[row]), q_len):
            expected.append(best[column])
            if column + 1 < q_len and tokens[row, column + 1] != best[column]:
                break
        assert found[row] == expected


def sequence_probabilities(p, q_len):
    """Of every sequence that starts with `q_len` tokens drawn from p [.., prefix-independent columns], as a dict."""
    return {
        tokens: float(torch.stack([p[column, token] for column, token in enumerate(tokens)]).prod())
        for tokens in itertools.product(range(VOCAB), repeat=q_len)
    }


@pytest.mark.parametrize("source", ["looked up", "drawn", "drawn, close", "mixed"])
def test_tokens_kept_are_samples_of_the_target(source):
    """20,000 rows at once. What is missing after a rejection is drawn from p, as later rounds would."""
    draws, q_len = 20_000, 3
    torch.manual_seed(0)
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.05, 0.05, 0.4, 0.5], [0.25, 0.25, 0.0, 0.5]])
    q = torch.tensor([[0.1, 0.3, 0.4, 0.2], [0.7, 0.1, 0.1, 0.1], [1.0, 0.0, 0.0, 0.0]])
    if source == "drawn, close":
        q = (0.9 * p + 0.1 * q).roll(0)
    drafts = torch.stack([torch.multinomial(q[column], draws, replacement=True) for column in range(q_len - 1)], 1)
    looked_up = torch.tensor([0, 3]).expand(draws, 2)
    drawn = torch.full((draws,), source.startswith("drawn"))
    if source == "mixed":
        drawn = torch.arange(draws) % 2 == 0
    drafts = torch.where(drawn[:, None], drafts, looked_up)
    tokens = torch.cat([torch.zeros(draws, 1, dtype=torch.long), drafts], 1)
    counts = torch.full((draws,), q_len)
    decided = accept_sampled(p.expand(draws, -1, -1), tokens, counts, q.expand(draws, -1, -1), drawn)
    kept = emitted(decided, [q_len] * draws)
    seen = dict.fromkeys(itertools.product(range(VOCAB), repeat=q_len), 0)
    for row in kept:
        while len(row) < q_len:
            row.append(int(torch.multinomial(p[len(row)], 1)))
        seen[tuple(row)] += 1
    exact = sequence_probabilities(p, q_len)
    assert sum(abs(seen[key] / draws - exact[key]) for key in exact) / 2 < 0.02
    assert all(n == 0 for key, n in seen.items() if exact[key] == 0)


def test_rows_without_drafts_and_rows_that_have_ended():
    scores = torch.eye(VOCAB)[None, :3].repeat(3, 1, 1)
    tokens = torch.tensor([[0, 0, 1], [9, 9, 9], [0, 0, 3]])
    found = emitted(accept_greedy(scores, tokens, torch.tensor([3, 1, 0])), [3, 1, 0])
    assert found[:2] == [[0, 1, 2], [2]]


def test_a_draft_that_equals_the_target_is_always_kept():
    torch.manual_seed(1)
    p = torch.rand(500, 4, VOCAB).softmax(-1)
    tokens = torch.cat([torch.zeros(500, 1, dtype=torch.long), *(torch.multinomial(p[:, c], 1) for c in range(3))], 1)
    decided = accept_sampled(p, tokens, torch.full((500,), 4), p, torch.ones(500, dtype=torch.bool))
    assert (decided[:, -2] == 3).all()
