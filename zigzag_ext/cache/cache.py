"""ZigzagCache: full buffers for retrieval layers, rings for streaming layers, one set of per-row lengths for all of them.

Beside them it holds the states of layers that keep no keys, or states beside their keys (`states.py`).

`update` copies nothing: it hands the new keys and values on, and the attention function that `zigzag_ext.enable` installs
attends and appends in one launch per layer through `ZigzagLayer.attend` (two where a layer mixes heads of both kinds). A forward
pass is one `Forward`: checks and memory come before anything is written, the lengths advance at the end.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..attention.buffers import check_free
from ..attention.store import GROWTH_STEP, MAX_TOKENS, LayerStore
from ..planning.layers import field_of, geometries, kv_sources
from ..planning.native import plan_for
from ..planning.origin import origin_of
from ..planning.plan import token_count
from .building import layers_of
from .compression import PromptCompression
from .compression.apply import checked, compress
from .forward import Forward
from .layer import ZigzagLayer
from .report import memory_report
from .row_changes import batch_repeat_interleave, batch_select_indices, reorder_cache
from .rows import Rows
from .saved import load, save
from .state import Addresses, CacheState, check_lengths, locked
from .states import StateLayer


class ZigzagCache(Cache):
    """KV cache of a plan, for `model.generate(..., cache=cache)` on a model prepared by `zigzag_ext.enable`.

    Args:
        config: the model's config; a retrieval, streaming, native or mixed layer, or one that holds a state, is made for each
            layer that has keys or a state of its own. Layers that share the KV cache of another one, as the last ones of Gemma 3n
            and Gemma 4, attend that one's.
        plan: `zigzag_ext.Plan`, native layers as the config has them (`Plan.with_native`). The plan of the cache wins over the
            plan given to `enable`. None: the model as it is, rings for native windows and every token in the other layers.
        max_len: most tokens a row may hold (padding does not count), up to 2^30. None: as many as there is memory for.
        rollback: tokens that `crop` can take back once a ring is full: rings hold as many more.
        compress: how retrieval layers thin out the prompt once it has been read, for one `PromptWindows`; None: not at all.

    Rings always take sink + window + rollback tokens, each layer its own. Retrieval layers reserve addresses for all tokens to
    come (without `max_len` for those that the model was made for, and for more when these are full) and take memory as tokens
    come (`zigzag_ext.attention.buffers`): within their addresses they never move and are never copied. Keys and values are held
    in the formats of the plan (`kv_format`, `ring_kv_format`, `key_smoothing`). Buffers are [batch, num_kv_heads, slots,
    head_dim] and live where the keys live.
    Rows may be padded anywhere (`attention_mask` with 0 for padding, which is not stored); what is stored stays visible.
    The cache may be given to several generate() calls:
    pass the whole conversation, longer than what is held, and it goes on where it stopped; `reset()` empties it and keeps its
    addresses. Only an empty cache takes `prefill_chunk_size`, whose chunks start with the first token. A forward that fails, at
    whatever point, leaves the cache as it was, or marked: further use then raises RuntimeError with the reason until `reset()`.
    Recurrent and convolution states cannot go back: with such layers nothing can be taken back but all tokens.

    Raises:
        TypeError: `plan` is not a Plan, or `max_len` not an integer.
        ValueError: layer or KV head counts or native windows differ, the plan was made for another geometry (`Plan.origin`),
            or `max_len` or `rollback` is out of range.
        RuntimeError: used without `enable`; or more than `max_len` tokens, before anything is written.
        MemoryError: no memory for the tokens of a forward; what is held stays as it was.

    Example:
        >>> zz.enable(model, plan)
        >>> cache = zz.ZigzagCache(model.config, plan, max_len=8192)
        >>> model.generate(**inputs, cache=cache)
        >>> cache.memory_bytes()
    """

    def __init__(
        self, config, plan=None, max_len: int | None = None, rollback: int = 0, compress: PromptCompression | None = None
    ):
        self._build(config, plan, *check_lengths(max_len, rollback), stores=True, compress=compress)

    @classmethod
    def without_memory(cls, config, plan) -> "ZigzagCache":
        """A cache that keeps nothing, for forwards with `use_cache=False`: the chunk attends to itself under the plan's masks."""
        cache = cls.__new__(cls)
        cache._build(config, plan, None, 0, stores=False)
        return cache

    def _build(
        self, config, plan, max_len: int | None, rollback: int, stores: bool, compress: PromptCompression | None = None
    ) -> None:
        model, config = origin_of(config), config.get_text_config(decoder=True)
        plan = plan_for(config, plan)
        sources = kv_sources(config)
        compress = None if compress is None else checked(compress, plan.sink, bool(plan.mixed_layers), config=config)
        num_lengths = 1 + len(plan.kinds) if compress else 1
        self.state, self.rollback = CacheState(max_len, stores, sources, compress, num_lengths, plan.sink), rollback
        self.state.made_for = plan, model, geometries(config)
        positions = field_of(config, "max_position_embeddings")
        self.state.expected = positions if isinstance(positions, int) and positions > 0 else None
        plan.check_kv_heads(model["kv_heads"])
        super().__init__(layers=layers_of(self.state, config, plan, rollback))

    def forward(
        self, batch: int, q_len: int, attention_mask=None, ids=None, position_ids: Tensor | None = None, counts=None,
        images: bool = False,
    ) -> Forward:  # fmt: skip
        """`with cache.forward(...):` brackets a forward pass of `q_len` new columns, see `Forward`.

        attention_mask: [batch, seen + q_len], 0 where a row has no token: such a column is not stored, its output means nothing.
        ids: [batch, q_len] of the tokens, None if they come as embeddings. position_ids: [batch or 1, q_len], only compared with
        the tokens held, and only without a mask, which tells more. counts: [batch] on the host, instead of a mask: row i gets the
        last counts[i] of the columns, behind its own last token; the columns before them are nothing. images: whether ids do not
        tell all of the tokens.
        """
        return Forward(self, batch, q_len, attention_mask, ids, position_ids, counts, images)

    reorder_cache = reorder_cache
    batch_select_indices = batch_select_indices
    batch_repeat_interleave = batch_repeat_interleave
    memory_report = memory_report
    save = save
    load = classmethod(load)

    @property
    def seq_lens(self) -> Tensor | None:
        """[batch] int32 on the device: tokens held per row, padding not counted. None before the first forward."""
        first = self.attention_layers[0]
        return self.state.lengths_on(first.device)[0] if first.is_initialized else None

    @property
    def addresses(self) -> Addresses:
        """Stands for the present buffers, for who files something by them."""
        return self.state.addresses

    def lives_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the buffers, if there are any, are what a model of this device and dtype needs."""
        return all((layer.device, layer.dtype) == (device, dtype) for layer in self.attention_layers if layer.is_initialized)

    @property
    def memory(self) -> tuple[CacheState, list[ZigzagLayer | StateLayer], int]:
        """The buffers and what they hold, without the cache itself: `on_memory_of` makes another one of them."""
        return self.state, self.layers, self.rollback

    @classmethod
    def on_memory_of(cls, state: CacheState, layers: list[ZigzagLayer | StateLayer], rollback: int) -> "ZigzagCache":
        """An empty cache on the `memory` of one that is gone."""
        cache = cls.__new__(cls)
        cache.state, cache.rollback = state, rollback
        super(ZigzagCache, cache).__init__(layers=layers)
        cache.reset()
        return cache

    @cached_property
    def attention_layers(self) -> list[ZigzagLayer]:
        """The layers that keep keys and values."""
        return [layer for layer in self.layers if isinstance(layer, ZigzagLayer)]

    @cached_property
    def attending(self) -> list[int]:
        """The layers of the model that attend, those without keys of their own as well."""
        return [layer for layer, source in enumerate(self.state.sources) if isinstance(self.layers[source], ZigzagLayer)]

    @cached_property
    def states(self) -> list[StateLayer]:
        """The states of all layers that have one, in its place or beside keys and values."""
        layers = (getattr(layer, "states", layer) for layer in self.layers)
        return [layer for layer in layers if isinstance(layer, StateLayer) and layer.keeps]

    @cached_property
    def holders(self) -> list[ZigzagLayer | StateLayer]:
        """All that hold something of each row: the layers with keys, and the states, those beside keys as well."""
        return [*self.attention_layers, *self.states]

    @property
    def stores(self) -> list[LayerStore]:
        """All stores of all layers."""
        return [store for layer in self.attention_layers for store in layer.stores]

    def memory_bytes(self) -> int:
        """Bytes of memory that all key and value buffers, and all states, take now."""
        return sum(holder.memory_bytes for holder in self.holders)

    def kv_bytes(self) -> int:
        """Bytes of the keys, values and scales of the tokens held: `memory_bytes` without states, pages and room to grow.

        Retrieval layers count the longest row for every row, rings all their slots: what `solve` reckons with.
        """
        return sum(store.kv_bytes(self.state.slots_held(store)) for store in self.stores)

    @locked
    def reserve(self, tokens: int) -> None:
        """Memory for `tokens` more tokens per row, where buffers stand. Raises as a forward of as many would.

        TypeError, ValueError: `tokens` is not an integer of 0 to 2^30.
        """
        self.state.check()
        if not 0 <= (tokens := token_count("tokens", tokens)) <= MAX_TOKENS:
            raise ValueError(f"reserve() takes 0 to 2^30 tokens, got {tokens}")
        self.ensure_capacity(self.state.rows.followed_by(tokens))

    @locked
    def write_ahead(self, tokens: Sequence[int]) -> None:
        """Goes before ops that write tokens[i] tokens behind the end of row i without a forward: drafts, to be overwritten.

        Gets memory for them, and keeps in mind that rings hold them. Raises RuntimeError where a ring has no slots for so many,
        or as `reserve` does, before anything changes.
        """
        state = self.state
        state.check()
        tokens = state.rows.new_tokens("write_ahead()", tokens)
        rows = state.rows.with_ahead(tokens)
        if layers := self.incomplete_layers(rows):
            raise RuntimeError(
                f"{max(tokens)} tokens of a draft would overwrite what the rings of layers {layers} show: give ZigzagCache or "
                f"enable() a rollback of as many (rollback={self.rollback})"
            )
        self.ensure_capacity(state.rows.grown_by(tokens))
        state.rows = rows

    def ensure_capacity(self, rows: Rows) -> None:
        """Memory for `rows`. Raises RuntimeError beyond `max_len`, MemoryError where there is none."""
        state, needed = self.state, rows.grown
        full = state.max_len is not None and rows.longest > state.max_len
        if not state.stores or (needed <= state.capacity and not full) or all(layer.window for layer in self.attention_layers):
            return
        if full:
            raise RuntimeError(
                f"the cache is full: max_len is {state.max_len} tokens, this forward needs {rows.longest} ({state.longest} are "
                "held); nothing was written. Make the ZigzagCache with a larger max_len"
            )
        capacity = -(-needed // GROWTH_STEP) * GROWTH_STEP
        capacity = capacity if state.max_len is None else min(capacity, state.max_len)
        check_free(wanted for store in self.stores for wanted in store.growth(state.slots_for(capacity, store)))
        if any(store.moves_for(state.slots_for(capacity, store)) for store in self.stores):
            state.addresses = Addresses()  # first: an interrupt below must not leave steps that were compiled on old addresses
        for layer in self.attention_layers:
            layer.grow(capacity)
        state.capacity = capacity  # last: out of memory above leaves the old one, so that the next forward grows the rest

    @locked
    def compress(self, method: PromptCompression | None = None) -> None:
        """Thins out the prompt by the method that the cache was made with; else done before the first forward behind it.

        A prompt is what came in forwards of more than `MAX_DECODE_QUERIES` tokens, or up to where generate() says that it ends.
        Done once, until `reset`: what comes later is kept in full.

        Args:
            method: another one, this time; it observes no more tokens.

        Raises:
            RuntimeError: the cache was made without `compress`. TypeError, ValueError: `method` is none, or not for this cache.
        """
        state = self.state
        state.check()
        if state.compression is None:
            raise RuntimeError("this ZigzagCache was made without compress=, so it has not kept what the choice of tokens needs")
        if method is not None:
            method = checked(method, state.sink, any(s.heads for s in self.stores), most_observed=state.compression.observe)
        compress(self, method or state.compression)

    @property
    def compressed(self) -> dict[int, tuple[int, int]]:
        """Tokens of the longest row that each compressed layer holds, and that it has dropped, by layer."""
        row = int(self.state.rows.held.argmax()) if self.state.compressed else 0
        layers = self.attention_layers if self.state.compressed else []
        left_out = {layer.index: self.state.left_out[layer.index + 1] for layer in layers}
        return {index: (self.state.longest - int(n[row]), int(n[row])) for index, n in left_out.items() if n.any()}

    def incomplete_layers(self, rows: Rows) -> list[int]:
        """Layers that no longer hold what `rows` show, after what was written ahead of them; states never go back."""
        return sorted({holder.index for holder in self.holders if not holder.is_whole(rows)})

    def refuse_states(self, layers: list[int], what: str) -> None:
        """Raises RuntimeError if any of `layers`, which cannot take tokens back, has a state."""
        if held := [states.index for states in self.states if states.index in layers]:
            raise RuntimeError(
                f"{what} would take tokens back, which the recurrent or convolution states of layers {held} have taken in; "
                "nothing was changed. Call reset() and read the prompt again"
            )

    @locked
    def reset(self) -> None:
        """Empties the cache, gives the memory of retrieval layers back and keeps all addresses; none of a marked cache."""
        whole, self.state.prompt_end = self.state.changing is None, 0
        if whole:
            self.state.forget(self.state.batch)
        else:
            self.state.start(None)  # a change of the rows may have gone through some layers only
        for holder in self.holders:
            holder.release() if whole else holder.drop()

    @locked
    def crop(self, tokens: int | Sequence[int]) -> None:
        """Takes the last tokens back: `-tokens` of them if negative; all but the first `tokens` if positive; none for 0.

        A sequence has such a number for each row, counted from the row's own end. Columns are counted, padding included. Waits
        for nothing. Rows that end before the longest one have left its last columns out: the next mask has zeros there.

        Raises:
            RuntimeError: a ring has overwritten what would show again: it can take `rollback` tokens back, or any number until it
                has been full. Or more than all are to be taken back. Nothing was changed.
            ValueError: a sequence has another length than the batch, or a number does not fit 64 bits. TypeError: it is none.
        """
        state = self.state
        state.check()
        rows = state.rows.cropped(tokens)
        removed = int((state.rows.ends - rows.ends).max(initial=0))
        if not removed:
            return
        if layers := self.incomplete_layers(rows):
            self.refuse_states(layers, f"crop({tokens})")
            self._refuse_compressed(layers, f"crop({tokens})")
            raise RuntimeError(
                f"crop({tokens}) takes {removed} tokens back; the rings of layers {layers} can take back "
                f"{max(0, self.rollback - state.rows.furthest_ahead)} (rollback={self.rollback}); nothing was changed. Give "
                "ZigzagCache or enable() a larger rollback"
            )
        with state.change("crop()"):
            state.remove(rows)

    def _refuse_compressed(self, layers: list[int], what: str) -> None:
        """Raises RuntimeError if any of `layers`, which cannot take tokens back, has dropped some of a prompt."""
        if not self.compressed.keys().isdisjoint(layers):
            raise RuntimeError(
                f"{what} would take tokens of a compressed prompt back, of which layers {sorted(self.compressed)} have dropped "
                "some; nothing was changed. Call reset() and read the prompt again"
            )

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` can take tokens back at any time: no layer streams, or rings have `rollback` slots for it; no states."""
        return not self.states and all(layer.is_croppable for layer in self.attention_layers)

    def activate_past_recording(self) -> None:
        """What assisted decoding calls before it starts; raises RuntimeError if rings cannot take tokens back."""
        self.refuse_states([states.index for states in self.states], "assisted or prompt-lookup decoding")
        if not self.is_croppable:
            raise RuntimeError(
                "assisted and prompt-lookup decoding take tokens back, which rings can do only with slots for it: give "
                "ZigzagCache or enable() rollback=20, or as many tokens as are drafted at once"
            )

    @locked
    def keep_first(
        self, ids: Tensor, mask: Tensor | None = None, images: bool = False, print_of: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Prepares for a call that brings the whole conversation `ids` [batch, n]: takes back what it does not begin with.

        What is held beyond ids[:, : n - 1] is taken back too, since a model has to see a token to go on. ids may be
        `fingerprints`, see `HeldTokens.first_difference` for print_of. Waits for the device. Raises ValueError naming the first
        differing position where a ring cannot take that many tokens back; or if the call brings `images`, or begins with a part
        of a prompt with images, which ids do not tell.
        """
        state = self.state
        state.check()
        copies, rest = divmod(state.batch or 0, ids.shape[0])
        if not state.columns or rest:
            return
        ids = ids.repeat_interleave(copies, 0)  # as generate() does for beams
        mask = None if mask is None else mask.repeat_interleave(copies, 0)
        same = min(state.tokens.first_difference(ids, mask, images, print_of), ids.shape[1] - 1)
        if same == state.columns:
            return
        if layers := self.incomplete_layers(state.rows.cut_at(np.minimum(state.rows.ends, same))):
            self.refuse_states(layers, "generate()")
            self._refuse_compressed(layers, "generate()")
            shorter = same == ids.shape[1] - 1
            what = f"{state.columns - same} tokens beyond those given" if shorter else f"another token at position {same}"
            raise ValueError(
                f"the ZigzagCache holds {state.columns} tokens, {what}, and its rings cannot take back "
                f"{state.columns - same}: call reset() before another conversation, or make it with rollback >= that"
            )
        if same:
            self.crop(same)
        else:
            self.reset()

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        return self.get_max_length(layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Most tokens a row can hold: `max_len`, or -1 (no limit) for a growing cache or a plan of streaming layers only."""
        lengths = [layer.get_max_length() for layer in self.layers]
        return max(lengths) if layer_idx is None else lengths[layer_idx]
