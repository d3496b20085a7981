"""MagicDec's scheme, re-created: the draft is the model itself on a streaming cache of its own (https://arxiv.org/abs/2408.11049).

Its cache takes memory and a prompt of its own, and falls behind where all drafts of a row were right: the last of them was never
fed to the draft, so the next round feeds two tokens ("next_double" in https://github.com/Infini-AI-Lab/MagicDec). Everything else
is ours: kernels, compiled steps, per-row lengths, verification.
"""

import torch
from torch import Tensor

import zigzag_ext as zz
from zigzag_ext.hf.session import Session

from ..cells.fake_context import MARGIN, fake_zigzag

SINK = 64


def streaming_plan(layers: int, window: int) -> zz.Plan:
    return zz.Plan(["streaming"] * layers, sink=SINK, window=window)


class OwnCacheDraft:
    """In the place of `StreamingDraft`. The draft's cache holds as many tokens as the target's, of random contents."""

    def __init__(self, session: Session, cache: zz.ZigzagCache, window: int):
        self.session, self.target, self.window = session, cache, window
        self.cache = self.last = None  # the last token that each row drafted

    def __call__(self, latest: Tensor, tokens: list[int], position_offset: Tensor, choose) -> tuple[Tensor, None]:
        if self.cache is None:
            plan, held = streaming_plan(len(self.target.layers), self.window), self.target.state.columns
            self.cache = fake_zigzag(self.session.model, plan, held, MARGIN, len(latest), self.target.rollback)
        behind = self.target.state.rows.ends - self.cache.state.rows.ends  # -k ... 1
        self.cache.crop([min(0, int(n)) for n in behind])
        counts = [int(asked > 0) * (1 + max(0, int(n))) for asked, n in zip(tokens, behind, strict=True)]
        first = latest[:, None] if self.last is None else torch.stack([self.last, latest], 1)
        logits, drafts = self._step(first, counts), latest[:, None][:, :0]
        for step in range(max(tokens)):
            if step:
                logits = self._step(latest[:, None], [int(asked > step) for asked in tokens])
            latest, _ = choose(logits, drafts, step)
            drafts = torch.cat([drafts, latest[:, None]], 1)
        self.last = drafts.gather(1, (torch.tensor(tokens, device=drafts.device)[:, None] - 1).clamp(min=0))[:, 0]
        return drafts, None

    def _step(self, ids: Tensor, counts: list[int]) -> Tensor:
        """Logits [batch, vocab] of the last column."""
        column = torch.arange(ids.shape[1], device=ids.device)
        first = ids.shape[1] - torch.tensor(counts, device=ids.device)[:, None]
        positions = self.cache.seq_lens[:, None] + (column - first).clamp(min=0)
        inputs = {"input_ids": ids, "position_ids": positions, "use_cache": True, "return_dict": True}
        return self.session.step(self.cache, counts, **inputs).logits[:, -1].float()
