"""ZigzagCache: full buffers for retrieval layers, rings for streaming layers, one set of per-row lengths for all of them.

`update` copies nothing: it hands the new keys and values on, and the attention function that `zigzag_ext.enable` installs
attends and appends in one launch per layer through `ZigzagLayer.attend` (two where a layer mixes heads of both kinds). A forward
pass is bracketed by `begin`, which makes every check on the host before anything is written, and `end`, which advances the
lengths by one in-place device add.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..planning.kv_format import PLAIN
from ..planning.plan import Plan, token_count
from .layer import GROWTH_STEP, ZigzagLayer
from .mixed import MixedLayer
from .state import Rows, Steps, in_normal_mode


class ZigzagCache(Cache):
    """KV cache of a plan, for `model.generate(..., cache=cache)` on a model prepared by `zigzag_ext.enable`.

    Args:
        config: the model's config; a retrieval, streaming or mixed layer is made for each of its `num_hidden_layers`.
        plan: `zigzag_ext.Plan`. The plan of the cache wins over the plan given to `enable`.
        max_len: most tokens a row may hold (padding does not count). None: as many as there is memory for.

    Rings always take sink + window tokens. Retrieval layers reserve addresses for all tokens to come and take memory as tokens
    come (`zigzag_ext.attention.buffers`): they never move and are never copied, and only slots in use may be looked at. Keys and
    values are held in the formats of the plan (`kv_format`, `ring_kv_format`, `key_smoothing`). Buffers are [batch, num_kv_heads,
    slots, head_dim] and live where the keys live.
    Rows may be padded on the left (`attention_mask` of zeros, then ones). The cache may be given to several generate() calls:
    pass the whole conversation, longer than what is held, and it goes on where it stopped; `reset()` empties it and keeps its
    addresses. Only an empty cache takes `prefill_chunk_size`, whose chunks start with the first token. Rolling back (`crop`,
    needed by assisted decoding) is not possible: a ring has overwritten what it would have to bring back.

    Raises:
        TypeError: `plan` is not a Plan, or `max_len` not an integer.
        ValueError: layer or KV head counts differ, layers share KV caches, or `max_len` < 1.
        RuntimeError: used without `enable`; or more than `max_len` tokens, before anything is written.
        MemoryError: no memory for the tokens of a forward; what is held stays as it was.

    Example:
        >>> zz.enable(model, plan)
        >>> cache = zz.ZigzagCache(model.config, plan, max_len=8192)
        >>> model.generate(**inputs, cache=cache)  # past_key_values=cache before transformers 5.24
        >>> cache.memory_bytes()
    """

    def __init__(self, config, plan, max_len: int | None = None):
        if max_len is not None and (max_len := token_count("max_len", max_len)) < 1:
            raise ValueError(f"max_len must be at least 1 token, or None for a cache that grows; got {max_len}")
        self._build(config, plan, max_len, stores=True)

    @classmethod
    def without_memory(cls, config, plan) -> "ZigzagCache":
        """A cache that keeps nothing, for forwards with `use_cache=False`: the chunk attends to itself under the plan's masks."""
        cache = cls.__new__(cls)
        cache._build(config, plan, None, stores=False)
        return cache

    def _build(self, config, plan, max_len: int | None, stores: bool) -> None:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan must be a zigzag_ext.Plan (Plan.load(path) reads a plan file), got {plan!r}")
        config = config.get_text_config(decoder=True)
        if len(plan.kinds) != config.num_hidden_layers:
            raise ValueError(f"the plan has {len(plan.kinds)} layers, the model has {config.num_hidden_layers}")
        if getattr(config, "num_kv_shared_layers", None):
            raise ValueError(f"{config.model_type}: the last {config.num_kv_shared_layers} layers share KV caches; not supported")
        self._rows = Rows(max_len, stores)
        plan.check_kv_heads(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        formats = (plan.kv_format, plan.ring_kv_format) if stores else (PLAIN, PLAIN)
        smooth = plan.key_smoothing
        kinds = {"retrieval": (0, 0, formats[0], smooth), "streaming": (plan.sink, plan.window, formats[1], smooth)}

        def layer(index: int, kind) -> ZigzagLayer | MixedLayer:
            if isinstance(kind, str):
                return ZigzagLayer(self._rows, index, *kinds[kind])
            heads = {name: tuple(head for head, own in enumerate(kind) if own == name) for name in kinds}
            parts = [ZigzagLayer(self._rows, index, *own, heads[name]) for name, own in kinds.items()]
            return MixedLayer(self._rows, index, parts)

        super().__init__(layers=[layer(index, kind) for index, kind in enumerate(plan.kinds)])

    @property
    def seq_lens(self) -> Tensor | None:
        """[batch] int32 on the device: tokens held per row, padding not counted. None before the first forward."""
        first = self.layers[0]
        return self._rows.lengths_on(first.device) if first.is_initialized else None

    @property
    def decodes(self) -> bool:
        """Whether the forward under way adds one token per row to what is held already."""
        rows = self._rows
        return rows.q_len == 1 and rows.columns > 0 and rows.stores

    @property
    def padding(self) -> Tensor | None:
        """[batch] int32, of the forward under way: leading columns to skip. None without an attention mask or padding."""
        return self._rows.pad_on(self.layers[0].device)

    @property
    def num_forwards(self) -> int:
        """Forward passes opened so far, on these buffers."""
        return self._rows.num_forwards

    def lives_on(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the buffers, if there are any, are what a model of this device and dtype needs."""
        return all((layer.device, layer.dtype) == (device, dtype) for layer in self.layers if layer.is_initialized)

    @property
    def steps(self) -> Steps:
        """Decode steps compiled on the present buffers; emptied when these are replaced."""
        return self._rows.steps

    def was_given(self, layer_idx: int) -> bool:
        """Whether this cache got the new keys of a layer in the forward under way, or keeps none at all."""
        return layer_idx in self._rows.given or not self._rows.stores

    def mark_attended(self) -> None:
        """Notes that every layer has appended this forward's tokens: a compiled step cannot note it layer by layer."""
        self._rows.attended.update(layer.index for layer in self.layers)

    @property
    def parts(self) -> tuple[Rows, list[ZigzagLayer | MixedLayer]]:
        """The buffers and what they hold, without the cache itself: `from_parts` makes another one of them."""
        return self._rows, self.layers

    @classmethod
    def from_parts(cls, rows: Rows, layers: list[ZigzagLayer | MixedLayer]) -> "ZigzagCache":
        """An empty cache on the memory of one that is gone."""
        cache = cls.__new__(cls)
        cache._rows = rows
        super(ZigzagCache, cache).__init__(layers=layers)
        cache.reset()
        return cache

    def memory_bytes(self) -> int:
        """Bytes of memory that all key and value buffers take now."""
        return sum(layer.memory_bytes for layer in self.layers)

    def memory_report(self) -> str:
        """A small table of text: layers and bytes of memory by kind and format; a format's bytes include its scales."""
        groups: dict[tuple[str, str], list[int]] = {}
        for part in (part for layer in self.layers for part in layer.parts):
            kind = ("streaming" if part.window else "retrieval") + (" heads" if part.heads else "")
            groups.setdefault((kind, str(part.kv_format)), []).append(part.memory_bytes)
        rows = [(kind, f"{len(sizes)} layers", kv_format, f"{sum(sizes):,} bytes") for (kind, kv_format), sizes in groups.items()]
        rows.append(("all", f"{len(self.layers)} layers", "", f"{self.memory_bytes():,} bytes"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def begin(self, batch: int, q_len: int, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> None:
        """Opens a forward pass of `q_len` new columns: checks, grows the buffers, and notes the padding. Writes no token.

        attention_mask: [batch, seen + q_len], zeros then ones per row; waits for the device once, but never if q_len is 1,
        where a zero means that the row skips this token. position_ids: [batch or 1, q_len], only compared with the tokens held,
        and only without a mask, which tells more.
        """
        rows = self._rows
        if rows.q_len or rows.broken:
            raise RuntimeError("the last forward with this ZigzagCache failed half-way, its contents are not whole: call reset()")
        if rows.batch != batch:
            if rows.columns:
                raise ValueError(f"the cache holds {rows.batch} rows, the input has {batch}; use reset() or another cache")
            for layer in self.layers:
                layer.drop()
            rows.start(batch)
        pad, longest = None, rows.longest + q_len
        if attention_mask is not None:
            pad, longest = rows.read_mask(attention_mask, q_len)
        elif position_ids is not None:
            rows.check_positions(position_ids, q_len)
        self._ensure_capacity(longest)
        rows.pad = {} if pad is None else {pad.device: pad}
        rows.q_len, rows.longest_after = q_len, longest
        rows.num_forwards += 1
        rows.attended.clear()
        rows.given.clear()

    def _ensure_capacity(self, needed: int) -> None:
        rows = self._rows
        if not rows.stores or needed <= rows.capacity or all(layer.window for layer in self.layers):
            return
        if rows.max_len is not None and needed > rows.max_len:
            raise RuntimeError(
                f"the cache is full: max_len is {rows.max_len} tokens, this forward needs {needed} ({rows.longest} are held); "
                "nothing was written. Make the ZigzagCache with a larger max_len"
            )
        capacity = -(-needed // GROWTH_STEP) * GROWTH_STEP
        capacity = capacity if rows.max_len is None else min(capacity, rows.max_len)
        for layer in self.layers:
            layer.grow(capacity)
        rows.capacity = capacity  # last: out of memory above leaves the old one, so that the next forward grows the rest

    def end(self, failed: bool = False) -> None:
        """Closes the forward pass: advances the lengths, or marks the cache as unusable if a failure left some layers written."""
        rows = self._rows
        missed = [layer.index for layer in self.layers if layer.index not in rows.attended]
        q_len, rows.q_len, rows.broken = rows.q_len, 0, bool(rows.attended and (failed or missed))
        if missed and not failed:
            raise RuntimeError(f"layers {missed} never called zigzag attention: this model's layers are not all plain attention")
        if not failed:
            rows.advance(q_len)

    def reset(self) -> None:
        """Empties the cache, gives the memory of retrieval layers back and keeps all addresses."""
        for layer in self.layers:
            layer.release()
        self._rows.forget()

    def _select_rows(self, index: Tensor) -> None:
        rows = self._rows
        if not rows.columns:
            return
        for layer in self.layers:
            layer.select_rows(index)
        for device, lengths in rows.seq_lens.items():
            chosen = lengths.index_select(0, index.to(device))
            rows.seq_lens[device] = lengths.copy_(chosen) if len(index) == rows.batch else chosen
        if len(index) != rows.batch:
            rows.set_batch(len(index))

    @in_normal_mode
    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_rows(beam_idx)

    @in_normal_mode
    def batch_select_indices(self, indices: Tensor) -> None:
        indices = torch.as_tensor(indices)
        self._select_rows(indices.nonzero().flatten() if indices.dtype == torch.bool else indices.flatten())

    @in_normal_mode
    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._rows.batch is not None:
            self._select_rows(torch.arange(self._rows.batch).repeat_interleave(repeats))

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        return self.get_max_length(layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Most tokens a row can hold: `max_len`, or -1 (no limit) for a growing cache or a plan of streaming layers only."""
        lengths = [layer.get_max_length() for layer in self.layers]
        return max(lengths) if layer_idx is None else lengths[layer_idx]

    def activate_past_recording(self) -> None:
        raise NotImplementedError(
            "a ZigzagCache cannot roll back, its rings overwrite old tokens: assisted, prompt-lookup and contrastive decoding "
            "are not supported"
        )

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self.activate_past_recording()
