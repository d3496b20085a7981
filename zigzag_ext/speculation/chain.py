"""The streaming draft: the model itself, every layer reading sink and window of the target's own buffers.

Keys are cached after RoPE, and a retrieval layer has a slot per position: read through a window it is a streaming layer. So the
draft has no cache, no prefill and nothing to keep in step. The keys of its tokens go where the next forward overwrites them.
"""

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..attention.store import in_normal_mode
from ..cache import ZigzagCache
from ..cache.attending import attending
from ..cache.tokens import to_device
from ..hf.cache_argument import cache_argument
from ..hf.session import Session
from ..hf.step_cache import StepCache

DEFAULT_SINK = 64  # of the draft, where no layer of the plan streams
_VIEWS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # by addresses of a cache, then by sink and window


class StreamingDraft:
    """Drafts of one model on one cache, which must hold a prompt.

    window: tokens that retrieval layers are read through; streaming layers keep their own. Their sink is the plan's.
    """

    def __init__(self, session: Session, cache: ZigzagCache, window: int):
        self.session, self.cache = session, cache
        sinks = [store.sink for store in cache.stores if store.window]
        self.through = (max(sinks, default=DEFAULT_SINK), window)

    def __call__(
        self, latest: Tensor, tokens: list[int], position_offset: Tensor, choose: Callable[[Tensor, Tensor, int], tuple]
    ) -> tuple[Tensor, Tensor | None]:
        """Drafts tokens[i] tokens of row i behind `latest` [batch] int64, which the cache does not hold yet.

        Args:
            position_offset: [batch] int64, position of a token less the tokens before it.
            choose(logits [batch, vocab], drafted [batch, n], n): the token [batch] that a row drafts next, and the probabilities
                that it was drawn from, [batch, vocab], or None.

        Returns:
            drafts [batch, max(tokens)] int64, of which row i has the first tokens[i], and [batch, max(tokens), vocab] or None.
        """
        with self.cache.state.lock:  # no other thread gives the memory back meanwhile
            self.cache.write_ahead(tokens)
            steps = max(tokens)
            idle = torch.tensor([[n <= step for n in tokens] for step in range(steps)], dtype=torch.int32)
            idle = to_device(idle.numpy(), latest.device)
            view = self._view()
            lengths = view.lengths.copy_(self.cache.state.seq_lens[latest.device])
            drafts = torch.empty(len(latest), 0, dtype=torch.long, device=latest.device)
            all_probs = []
            for step in range(steps):
                view.pad.copy_(idle[step])
                logits = self._logits(view, latest, lengths[0] + position_offset)
                latest, probs = choose(logits, drafts, step)
                drafts = torch.cat([drafts, latest[:, None]], 1)
                all_probs.append(probs)
                lengths.add_(1 - idle[step])
        return drafts, None if all_probs[0] is None else torch.stack(all_probs, 1)

    def _logits(self, view: "_View", latest: Tensor, positions: Tensor) -> Tensor:
        """[batch, vocab] float32, of one forward of the draft."""
        inputs = {"input_ids": latest[:, None], "position_ids": positions[:, None], "use_cache": True}
        inputs |= cache_argument(self.session.model, view.cache)
        if self.session.compiled is not None:
            return self.session.compiled.draft(self.cache, view.cache, inputs).float()
        with torch.no_grad(), attending(None), attending(view.cache):
            output = self.session.behind("forward")(**inputs)
        return output.logits[:, -1].float()

    def _view(self) -> "_View":
        views = _VIEWS.setdefault(self.cache.addresses, {})
        if self.through not in views:
            views[self.through] = _View(self.cache, self.through)
        return views[self.through]


class _View:
    """The buffers as the draft reads them, and the lengths [num_lengths, batch] that it counts by itself."""

    @in_normal_mode
    def __init__(self, cache: ZigzagCache, through: tuple[int, int]):
        device = cache.attention_layers[0].device
        self.lengths, self.pad = torch.zeros_like(cache.state.seq_lens[device]), torch.zeros_like(cache.seq_lens)
        self.cache = StepCache(cache, self.lengths.unbind(0), self.pad, through)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that a step reads: all but an input embedding that no other layer shares."""
    embedding = model.get_input_embeddings().weight
    output = model.get_output_embeddings()
    looked_up = 0 if output is not None and output.weight is embedding else _bytes(embedding)
    return sum(map(_bytes, model.parameters())) - looked_up


def _bytes(tensor: Tensor) -> int:
    """Of a plain tensor, of the parts of a quantised one, or of what this process holds of one that is shared out."""
    if hasattr(tensor, "to_local"):
        return _bytes(tensor.to_local())
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes
