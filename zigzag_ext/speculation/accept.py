"""Which drafts a forward confirms, and the token that follows them: on the device, for all rows at once.

Rows are right-aligned in the columns of a forward: row i has its latest token in column q_len - counts[i], then its drafts. The
scores of column c are about the token of column c + 1; those of the last column about the one behind all drafts.
"""

import torch
from torch import Tensor


def accept_greedy(scores: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """The drafts of each row up to the first that is not the best token there, and that best token.

    Args:
        scores: [batch, q_len, vocab]. tokens: [batch, q_len] int64. counts: [batch] int64, latest token and drafts of each row.

    Returns:
        [batch, q_len + 1] int64: the drafts of `tokens`, then how many columns were confirmed (those without a draft counted),
        then the token that follows them. Rows of no tokens hold nothing of meaning.
    """
    best = scores.argmax(-1)
    last = last_confirmed(best[:, :-1] == tokens[:, 1:], counts)
    return torch.cat([tokens[:, 1:], last, best.gather(1, last)], 1)


def accept_sampled(probs: Tensor, tokens: Tensor, counts: Tensor, draft_probs: Tensor | None, sampled: Tensor | None) -> Tensor:
    """Rejection sampling: the tokens kept are distributed as samples of `probs`, whatever the drafts are.

    A draft x is kept with probability min(1, p(x) / q(x)); instead of the first one that is not, a token is drawn from
    max(p - q, 0), and behind the last one from p. q of a draft that was not drawn, but looked up, is 1 for that token.

    Args:
        probs: [batch, q_len, vocab] float32, p. draft_probs: [batch, q_len, vocab], q of the token in the next column, and
        sampled: [batch] bool, rows whose drafts were drawn from it; None: all were looked up. Others as in `accept_greedy`.

    Returns:
        As `accept_greedy`.

    Source: Leviathan et al. (https://arxiv.org/abs/2211.17192), algorithm 1.
    """
    drafts = tokens[:, 1:, None]
    chance = probs[:, :-1].gather(2, drafts)[..., 0]
    proposed = torch.ones_like(chance)
    if draft_probs is not None:
        proposed = torch.where(sampled[:, None], draft_probs[:, :-1].gather(2, drafts)[..., 0], proposed)
    last = last_confirmed(torch.rand_like(chance) * proposed < chance, counts)
    row = torch.arange(len(last), device=last.device)[:, None]
    p = probs[row, last][:, 0]
    padded = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
    q = torch.zeros_like(p).scatter_(1, padded.gather(1, last), 1.0)
    if draft_probs is not None:
        q = torch.where(sampled[:, None], draft_probs[row, last][:, 0], q)
    q = torch.where(last == probs.shape[1] - 1, 0.0, q)
    rest = (p - q).clamp_(min=0)
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p)  # p and q equal up to rounding
    return torch.cat([tokens[:, 1:], last, torch.multinomial(rest, 1)], 1)


def last_confirmed(right: Tensor, counts: Tensor) -> Tensor:
    """[batch, 1]: the column whose scores decide: that of the first wrong draft, else the last one. right [batch, q_len - 1]."""
    column = torch.arange(right.shape[1], device=right.device)
    no_draft = column < right.shape[1] + 1 - counts[:, None]
    return (right | no_draft).long().cumprod(1).sum(1, keepdim=True)
