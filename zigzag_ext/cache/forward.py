"""Forward: one forward of a ZigzagCache, which commits, or leaves the cache as it was, or marks it with the reason."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..attention import ops
from ..attention.chunk import Chunk, LogitTerms
from ..attention.store import in_normal_mode
from .columns import back_in_order, copy_on, in_order, is_mixed
from .compression.observed import Observed
from .positions import check_positions
from .rows import Rows
from .shared import SharedKeys
from .state import locked
from .tokens import raise_mask_error, to_device

if TYPE_CHECKING:
    from .cache import ZigzagCache


class Forward:
    """`with cache.forward(batch, q_len, mask, ids) as forward:` one forward of `q_len` new columns, in one or more pieces.

    Opening makes every check and gets the memory; no token is written before. A piece is a pass through the model's layers, each
    of which attends once; a forward without `piece()` is one piece. Leaving advances the lengths. After an exception, whatever it
    was, the cache holds what it held before; only where a ring has overwritten tokens for the new ones it is marked instead.
    """

    def __init__(
        self,
        cache: "ZigzagCache",
        batch: int,
        q_len: int,
        mask: Tensor | None = None,
        ids: Tensor | None = None,
        positions: Tensor | None = None,
        counts: np.ndarray | None = None,
        images: bool = False,
    ):
        self.cache, self.state, self.batch, self.total = cache, cache.state, batch, q_len
        self.mask, self.ids, self.positions, self.counts, self.images = mask, ids, positions, counts, images
        self.given: set[int] = set()  # layers of the cache that were given their new keys in the present piece
        self.attended: set[int] = set()  # layers of the model that it has been through
        self.read: set[int] = set()  # layers whose states it has read, and so may have changed
        self.shared = SharedKeys()
        self.written = self.done = 0  # columns that any layer, that all layers have appended
        self.committing = False
        self.q_len = q_len  # columns of the present piece
        self.padding: Tensor | None = None  # [batch] int32, columns of this forward to skip; `hidden` [batch, q_len] are which
        self.hidden: Tensor | None = None
        self.reorders = False  # whether columns to skip may stand behind others
        self.pad: dict[torch.device, Tensor] = {}  # columns of the present piece to skip
        self.order: dict[torch.device, Tensor] = {}  # [batch, q_len] int64, its columns with those to skip first

    @locked
    def __enter__(self) -> "Forward":
        state = self.state
        state.check()
        state.tokens.raise_remembered()
        self._check_batch()
        self.before = state.rows
        read = self._read_mask if self.counts is None else self._read_counts
        if state.observed and self._follows_prompt():
            read()  # a forward that is refused has not ended the prompt
            self.cache.compress()
            self.before = state.rows
        self.observed = dict(state.observed)
        self.after = read()
        self.cache.ensure_capacity(self.after)
        if not self.before.columns:
            for states in self.cache.states:
                states.restart()
        self.lengths: dict[torch.device, Tensor] = {}  # before this forward; kept once a piece has advanced them
        self._set_pad()
        state.num_forwards += 1
        state.forward = self
        return self

    @locked
    def __exit__(self, kind, error, traceback) -> None:
        try:
            vars(self.cache).pop("shared_layers", None)  # keys that Gemma 3n in transformers 5.4 has left there
            if kind is None:
                self.state.check_open(self)
                self._check_attended()
                self._commit(last=True)
        except BaseException:
            self.roll_back()
            raise
        if kind is not None:
            self.roll_back()

    @contextmanager
    def piece(self, q_len: int) -> Iterator["Forward"]:
        """The next `q_len` columns of this forward, through all layers."""
        self.q_len = q_len
        for noted in (self.given, self.attended, self.read, self.shared.kept):
            noted.clear()
        self._set_pad()
        yield self
        self._check_attended()
        if self.done + q_len < self.total:
            with self.state.lock:
                self.state.check_open(self)
                self._commit(last=False)

    @property
    def columns(self) -> int:
        """Tokens seen per row before the present piece, padding included."""
        return self.state.columns

    @property
    def short(self) -> bool:
        """Whether this forward waits for nothing, its mask included: not where that says which rows have ended before others."""
        if self.mask is not None and self.before.ragged:
            return False
        return self.total == 1 or (self.before.columns > 0 and self.total <= ops.MAX_DECODE_QUERIES)

    @property
    def decodes(self) -> bool:
        """Whether this forward adds one token per row to what is held already."""
        return self.total == 1 and self.state.columns > 0 and self.state.stores and not self.observes

    @property
    def is_step(self) -> bool:
        """Whether this forward is one of those that come again and again in the same shape."""
        return self.counts is not None

    def pad_on(self, device: torch.device) -> Tensor | None:
        return copy_on(self.pad, device)

    def rows_on(self, device: torch.device) -> Tensor | None:
        """[batch] int32, rows of the cache that the batch has; None: all of them, in order."""
        return None

    def was_given(self, layer: int) -> bool:
        """Whether the cache got the new keys that a layer attends in this forward, or keeps none at all."""
        return self.state.sources[layer] in self.given or not self.state.stores

    def native_window(self, layer: int) -> int:
        return self.cache.layers[self.state.sources[layer]].native_window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None, terms: LogitTerms) -> Tensor:
        """Attention of a layer, then append. The ops skip leading columns: others to skip are brought there, and outputs back."""
        state = self.state
        with state.lock:
            state.check_open(self)
            if state.sources[layer] != layer:
                return self.shared.attend(self, layer, q, scale, terms)
            self.check_keys(layer, k)
            q, k, v = (in_order(t, self.order) for t in (q, k, v))
            self.shared.keep(self, layer, k, v)
            return back_in_order(self.cache.layers[layer].attend(q, k, v, scale, terms), self.order)

    def chunk(self, layer: int, k: Tensor) -> Chunk:
        """What layer `layer` needs to attend new keys k [batch, num_kv_heads, q_len, head_dim]. Raises unless it may."""
        self.check_keys(layer, k)
        if layer in self.attended:
            raise RuntimeError(f"layer {layer} attended twice in one forward")
        self.written = self.done + self.q_len
        return self._chunk(k.device)

    def _chunk(self, device: torch.device) -> Chunk:
        state = self.state
        return Chunk(
            state.lengths_on(device),
            self.pad_on(device),
            state.workspace(device),
            left_out=state.left_out,
            past=state.columns if state.rows.uniform else None,
            started=state.columns > 0 and state.rows.uniform,
            decodes=self.counts is not None,
        )

    @property
    def observes(self) -> bool:
        """Whether the queries of this forward may be the last ones of a prompt that is to be compressed."""
        state = self.state
        return state.compression is not None and not state.compressed and state.stores and not self._follows_prompt()

    def _follows_prompt(self) -> bool:
        """Whether this is a short forward behind a prompt, which so has ended."""
        return self.before.columns >= max(1, self.state.prompt_end) and self.total <= ops.MAX_DECODE_QUERIES

    @in_normal_mode
    def observe(self, layer: int, q: Tensor, scale: float) -> None:
        """Keeps the last queries, of q [batch, num_q_heads, q_len, head_dim], that the choice of tokens asks for."""
        most = self.state.compression.observe + self.cache.rollback  # of which crop() may take some back
        self.observed[layer] = Observed.of(q, self.pad_on(q.device), scale, most, self.observed.get(layer))

    def check_keys(self, layer: int, k: Tensor) -> None:
        if k.shape[0] != self.batch or k.shape[2] != self.q_len:
            raise ValueError(
                f"layer {layer} was given keys of {k.shape[0]} rows x {k.shape[2]} tokens in a forward of "
                f"{self.batch} rows x {self.q_len} tokens"
            )

    @contextmanager
    def attending_all(self) -> Iterator[None]:
        """Around what appends this piece in every layer: a compiled step cannot note it layer by layer."""
        with self.state.lock:
            self.state.check_open(self)
            self.written = self.done + self.q_len
            for states in self.cache.states:
                states.is_dirty = True
            yield
            self.attended.update(self.cache.attending)
            self.read.update(states.index for states in self.cache.states)

    def _check_batch(self) -> None:
        state = self.state
        if state.batch != self.batch:
            if state.columns:
                raise ValueError(f"the cache holds {state.batch} rows, the input has {self.batch}; use reset() or another cache")
            for holder in self.cache.holders:
                holder.drop()
            state.start(self.batch)

    def _check_attended(self) -> None:
        missed = [index for index in self.cache.attending if index not in self.attended]
        if missed:
            raise RuntimeError(f"layers {missed} never called zigzag attention: this model's layers are not all plain attention")
        missed = [states.index for states in self.cache.states if states.index not in self.read and self.state.stores]
        if missed:
            raise RuntimeError(f"layers {missed} never read the states that the ZigzagCache holds for them: it keeps others")

    def _read_counts(self) -> Rows:
        """The rows after this forward, where each gets the last `counts` [batch] columns, behind its own end."""
        if self.mask is not None:
            raise ValueError("a forward takes an attention_mask or the counts of its rows, not both")
        if self.total > ops.MAX_DECODE_QUERIES:
            raise ValueError(f"counts go with up to {ops.MAX_DECODE_QUERIES} new columns, got {self.total}")
        counts = self.counts = self.state.rows.new_tokens("counts", self.counts, self.total)
        device = next((layer.device for layer in self.cache.attention_layers if layer.is_initialized), torch.device("cpu"))
        self.padding = in_normal_mode(lambda: to_device((self.total - counts).astype(np.int32), device))()
        return self.state.rows.grown_by(counts)

    def _read_mask(self) -> Rows:
        """The rows after this forward.

        mask [batch, seen + q_len], 0 where a row has no token. A prompt waits for the device once. Up to `ops.MAX_DECODE_QUERIES`
        tokens on a cache that holds some wait for nothing: a wrong mask raises at once on a CPU, in a later forward on a GPU.
        """
        state, mask, q_len = self.state, self.mask, self.total
        if mask is None:
            self._check_positions()
            return state.rows.followed_by(q_len)
        if mask.dim() != 2 or tuple(mask.shape) != (self.batch, state.columns + q_len):
            raise ValueError(
                f"attention_mask must be [batch, tokens seen + new tokens] = [{self.batch}, {state.columns + q_len}], "
                f"0 for padding and 1 for tokens; got {tuple(mask.shape)}{self._used()}"
            )
        if self.short:
            return self._read_short_mask()
        return self._read_prompt_mask()

    def _check_positions(self) -> None:
        if self.positions is not None:
            held = self.state.lengths_on(self.positions.device)[0] if self.state.columns else None
            check_positions(self.positions, self.total, held, self.short, self._used())

    def _used(self) -> str:
        """The end of a message about arguments that do not go on where the cache stopped."""
        held = self.state.columns
        if not held:
            return ""
        return (
            f". The cache already holds {held} tokens; pass the whole conversation, or reset() "
            "(prefill_chunk_size needs an empty cache)"
        )

    def _mask_fault(self) -> Tensor:
        """0-d int64: what is wrong with the mask, see `HeldTokens`. transformers masks no states in forwards of one column."""
        ahead = self.short and self.state.rows.furthest_ahead > 0
        return self.state.tokens.mask_fault(self.mask, self.total, ahead, self.total == 1 and bool(self.cache.states))

    @in_normal_mode
    def _read_short_mask(self) -> Rows:
        state, q_len, mask = self.state, self.total, self.mask
        on_cpu = mask.device.type == "cpu"
        if on_cpu:
            raise_mask_error(int(self._mask_fault()))
        if q_len == 1:
            self.padding = state.read_step(mask[:, -1])
            self.hidden = self.padding[:, None] > 0
        else:
            self.hidden = mask[:, -q_len:] == 0
            self.padding = self.hidden.sum(1, dtype=torch.int32)
            self.reorders = not on_cpu or bool(is_mixed(self.hidden))
        return state.rows.with_some_left_out(q_len)  # until the next prompt's mask is read

    @in_normal_mode
    def _read_prompt_mask(self) -> Rows:
        state, q_len, mask = self.state, self.total, self.mask
        hidden = mask[:, -q_len:] == 0
        padding = hidden.sum(1, dtype=torch.int32)
        held = state.lengths_on(mask.device)[0] + (q_len - padding)
        fault = self._mask_fault().to(mask.device)
        code, mixed, *known = torch.cat([fault.reshape(1), is_mixed(hidden).reshape(1), held.long(), padding.long()]).tolist()
        raise_mask_error(code)
        held_then, left_out = np.array(known, dtype=np.int64).reshape(2, self.batch)
        if left_out.any():
            self.padding, self.hidden, self.reorders = padding, hidden, bool(mixed)
        return state.rows.with_padding(q_len, left_out, held_then, leads=not mixed)

    @in_normal_mode
    def _set_pad(self) -> None:
        """What is to skip in the present piece."""
        if self.padding is None:
            return
        hidden, pad = self._hidden_now(), self.padding
        if self.q_len != self.total:
            pad = hidden.sum(1, dtype=torch.int32)
        self.pad = {pad.device: pad}
        if self.reorders:
            self.order = {pad.device: (~hidden).byte().argsort(dim=1, stable=True)}

    def _hidden_now(self) -> Tensor | None:
        return None if self.hidden is None else self.hidden[:, self.done : self.done + self.q_len]

    @in_normal_mode
    def _commit(self, last: bool) -> None:
        """Advances the lengths by the present piece."""
        state = self.state
        if not last and not self.lengths:
            self.lengths = {device: lengths.clone() for device, lengths in state.seq_lens.items()}
        self._note_tokens(last)
        state.changing = "a forward was interrupted while the lengths advanced"
        self.committing = True  # behind the mark, which tells what `roll_back` then leaves as it is
        for device, lengths in state.seq_lens.items():
            lengths.add_(self.q_len)
            if self.pad:
                lengths.sub_(self.pad_on(device))
        state.rows = self.after if last else state.rows.followed_by(self.q_len)
        self.done += self.q_len
        if last:
            state.forward, state.observed = None, self.observed
            for states in self.cache.states:
                states.is_dirty = False
        self.committing = state.changing = None

    def _note_tokens(self, last: bool) -> None:
        """The ids of the present piece, and what a short forward's mask got wrong, found behind the work that it belongs to."""
        state, tokens = self.state, self.state.tokens
        if not state.stores or not state.seq_lens:
            return
        if last and self.short and self.mask is not None and self.mask.is_cuda:
            tokens.remember(self._mask_fault())
        device = next(iter(state.seq_lens))
        ids = None if self.ids is None else self.ids[:, self.done : self.done + self.q_len]
        tokens.images_end = state.columns + self.q_len if self.images else tokens.images_end
        if self.counts is not None:
            return tokens.note_rows(ids, self.counts, self.q_len, device, state.rows)
        tokens.note(ids, self._hidden_now(), self.batch, self.q_len, device, state.columns)

    @in_normal_mode
    def roll_back(self) -> None:
        """The lengths of before, unless this forward is over. A ring that has overwritten what these show is marked."""
        state = self.state
        if state.forward is not self:
            return
        if self.committing and not self.lengths:
            state.forward = None
            return  # nobody knows which lengths have advanced: `changing` says so
        state.changing = "a forward failed, and going back to what the cache held before was interrupted"
        state.forward = None
        for device, lengths in self.lengths.items():
            state.seq_lens[device].copy_(lengths)
        state.rows = self.before.with_ahead(self.written) if self.before.columns else self.before
        if self.counts is None:
            state.tokens.cut(state.columns)
        else:
            state.tokens.take_back(self.after.ends, self.before.ends)
        lost = self.cache.incomplete_layers(state.rows)
        state.changing = None
        if lost:
            took_in = [states.index for states in self.cache.states if states.index in lost]
            state.changing = "a forward failed half-way, " + (
                f"the recurrent or convolution states of layers {took_in} may have taken its tokens in"
                if took_in
                else f"its tokens have overwritten older ones in the rings of layers {lost}"
            )
