"""Attention of streaming and native layers over vLLM's KV cache: our op over a copy of the tokens that the layer holds.

The new tokens come from the call itself, the others from rings that `rings.py` tells how to fill.
"""

from dataclasses import dataclass

import torch

from ..attention import ops
from . import require_tested
from .blocks import SinkWindowSpec
from .rings import ring_positions, runs

require_tested()

from vllm.model_executor.layers.attention import Attention  # noqa: E402
from vllm.utils.torch_utils import is_quantized_kv_cache  # noqa: E402
from vllm.v1.attention.backend import (  # noqa: E402
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
)


@dataclass
class Call:
    """Requests that stand side by side in the batch and have equally many new tokens: one call of the op."""

    rows: int
    q_len: int
    tokens: slice  # of the batch's new tokens: rows * q_len of them
    blocks: torch.Tensor  # [rows, sink + window] int64: the block of what goes into each slot of the rings
    offsets: torch.Tensor  # its place in that block
    held: torch.Tensor  # [rows] int32: tokens in each ring


@dataclass
class SinkWindowMetadata:
    calls: list[Call]
    new_blocks: torch.Tensor  # [new tokens] int64: where the new keys and values are written
    new_offsets: torch.Tensor
    workspace: torch.Tensor


class SinkWindowBuilder(AttentionMetadataBuilder[SinkWindowMetadata]):
    """Once per step, for all layers of a group. What it needs on the host vLLM has there: nothing waits for a device."""

    reorder_batch_threshold = 1  # single new tokens in front: they are one call

    def __init__(self, kv_cache_spec: SinkWindowSpec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._workspace = ops.new_workspace(device)

    def build(self, common_prefix_len: int, common_attn_metadata, fast_build: bool = False) -> SinkWindowMetadata:
        batch, size = common_attn_metadata, self.kv_cache_spec.block_size
        starts = batch.query_start_loc_cpu.tolist()
        calls = [self._call(batch, *run) for run in runs(starts)]
        slots = batch.slot_mapping[: starts[-1]].long().clamp(min=0)  # padding goes into the null block
        return SinkWindowMetadata(calls, slots // size, slots % size, self._workspace)

    def _call(self, batch, rows: slice, tokens: slice, q_len: int) -> Call:
        spec, table = self.kv_cache_spec, batch.block_table_tensor[rows].long()
        positions, held = ring_positions(batch.seq_lens[rows].long() - q_len, spec.sink, spec.sliding_window)
        blocks = table.gather(1, positions // spec.block_size)
        return Call(rows.stop - rows.start, q_len, tokens, blocks, positions % spec.block_size, held)


class SinkWindowImpl(AttentionImpl):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes=None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks=None,
        sink: int = 0,
    ) -> None:
        found = {
            "ALiBi": alibi_slopes is not None,
            "attention without a window": sliding_window is None,
            f"{attn_type} attention": attn_type != AttentionType.DECODER,
            "keys of another layer": kv_sharing_target_layer_name is not None,
            "learned sink logits": sinks is not None,
            f"keys and values as {kv_cache_dtype}": is_quantized_kv_cache(kv_cache_dtype),
            f"head_dim {head_size} (served: {', '.join(map(str, ops.HEAD_DIMS))})": head_size not in ops.HEAD_DIMS,
            f"{num_heads // num_kv_heads} query heads per KV head": num_heads // num_kv_heads > ops.MAX_GROUP_SIZE,
        }
        if reasons := [reason for reason, is_there in found.items() if is_there]:
            raise ValueError(f"streaming layers are not served with {', '.join(reasons)} by zigzag_ext's plugin for vLLM")
        self.num_heads, self.num_kv_heads, self.head_size, self.scale = num_heads, num_kv_heads, head_size, float(scale)
        self.sink, self.window, self.softcap = sink, sliding_window, logits_soft_cap or 0.0

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ) -> torch.Tensor:
        """query [new tokens, num_heads, head_size], key and value the same with KV heads, after RoPE; kv_cache [blocks, KV heads,
        block size, 2 * head_size], the keys first, in any strides. Without metadata (a profiling run) the output is zeros."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("the output of streaming layers is not quantised")
        if attn_metadata is None:
            return output.zero_()
        # First all are written: a request may begin behind a prefix that another one brings in this very step.
        count = len(attn_metadata.new_blocks)
        new = torch.cat([key[:count], value[:count]], dim=-1)
        kv_cache[attn_metadata.new_blocks, :, attn_metadata.new_offsets] = new
        for call in attn_metadata.calls:
            self._attend(call, query, key, value, kv_cache, output, attn_metadata.workspace)
        return output

    def _attend(self, call: Call, query, key, value, kv_cache, output, workspace) -> None:
        columns = lambda x: x[call.tokens].unflatten(0, (call.rows, call.q_len)).transpose(1, 2)  # noqa: E731
        q = columns(query)
        rings = kv_cache[call.blocks, :, call.offsets].transpose(1, 2)  # [rows, KV heads, sink + window, 2 * head_size]
        keys, values = rings.split(self.head_size, dim=-1)
        ops.attention(
            q,
            columns(key),
            columns(value),
            keys,
            values,
            call.held,
            out=columns(output),
            lse=q.new_empty(call.rows, self.num_heads, call.q_len, dtype=torch.float32),
            sink=self.sink,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
            workspace=workspace,
        )


class SinkWindowBackend(AttentionBackend):
    supported_dtypes = list(ops.DTYPES)
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # of vLLM's names the one for backends from elsewhere

    @staticmethod
    def get_impl_cls() -> type[SinkWindowImpl]:
        return SinkWindowImpl

    @staticmethod
    def get_builder_cls() -> type[SinkWindowBuilder]:
        return SinkWindowBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(ops.HEAD_DIMS)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


class SinkWindowAttention(Attention):
    """A layer of vLLM that keeps its first `sink` and its last `per_layer_sliding_window` tokens."""

    def __init__(self, *, sink: int, **options) -> None:
        super().__init__(attn_backend=SinkWindowBackend, sink=sink, **options)
        self.sink = sink

    def get_kv_cache_spec(self, vllm_config) -> SinkWindowSpec:
        return SinkWindowSpec.from_window(super().get_kv_cache_spec(vllm_config), self.sink)
