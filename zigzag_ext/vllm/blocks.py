"""Which blocks of vLLM's KV cache a streaming layer holds: those of its sink and of its window; the gap's go back to the pool.

A sliding window that keeps its first blocks too. What vLLM does with windows (chunks of prompts, admission, prefix hits, frees)
stays as it is, and each method here adds the sink to it.
"""

from dataclasses import dataclass, fields

from . import require_tested

require_tested()

from vllm.utils.math_utils import cdiv  # noqa: E402
from vllm.v1.core.kv_cache_utils import resolve_block_hashes  # noqa: E402
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager  # noqa: E402
from vllm.v1.kv_cache_interface import SlidingWindowSpec  # noqa: E402
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """Of a layer that keeps its first `sink` and its last `sliding_window` tokens, the newest one included; sink may be 0."""

    sink: int = 0

    @classmethod
    def from_window(cls, spec: SlidingWindowSpec, sink: int) -> "SinkWindowSpec":
        return cls(sink=sink, **{field.name: getattr(spec, field.name) for field in fields(spec)})

    @property
    def sink_blocks(self) -> int:
        return cdiv(self.sink, self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(self.sink_blocks + window, cdiv(max_model_len, self.block_size) + 1)

    def is_uniform_with_collection(self, kv_cache_specs: dict) -> bool:
        """Whether all these layers hold the same tokens, so that one block table serves them."""
        return all(
            isinstance(spec, SinkWindowSpec) and (spec.sink, spec.sliding_window) == (self.sink, self.sliding_window)
            for spec in kv_cache_specs.values()
        )


class SinkWindowManager(SlidingWindowManager):
    def remove_skipped_blocks(self, request_id, processed_computed_tokens, num_prompt_tokens=None) -> None:
        end = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self.kv_cache_spec.sink_blocks, end)

    def get_num_blocks_to_allocate(
        self, request_id, num_tokens, new_computed_blocks, total_computed_tokens, *arguments, **options
    ) -> int:
        """Of a prefix hit, blocks of the sink leave the pool's free list, too, though they are before the window."""
        need = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *arguments, **options
        )
        skipped = self.get_num_skipped_tokens(total_computed_tokens) // self.block_size
        return need + self._get_num_evictable_blocks(new_computed_blocks[: min(self.kv_cache_spec.sink_blocks, skipped)])

    def add_local_computed_blocks(self, request_id, new_computed_blocks, *tokens) -> None:
        super().add_local_computed_blocks(request_id, new_computed_blocks, *tokens)
        blocks, found = self.req_to_blocks[request_id], new_computed_blocks[: self.kv_cache_spec.sink_blocks]
        lost = [index for index, block in enumerate(found) if blocks[index] is not block]
        self.block_pool.touch([found[index] for index in lost])
        for index in lost:
            blocks[index] = found[index]

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes,
        max_length,
        kv_cache_group_ids,
        block_pool,
        kv_cache_spec,
        drop_eagle_block,
        alignment_tokens,
        **options,
    ):
        """The longest prefix whose window is there, and whose sink is: where a block of the sink is missing, a shorter one may be
        whole. Such a prefix lies within the sink, so that all of its blocks are looked at here."""
        rows, length = super().find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=max_length,
            kv_cache_group_ids=kv_cache_group_ids,
            block_pool=block_pool,
            kv_cache_spec=kv_cache_spec,
            drop_eagle_block=drop_eagle_block,
            alignment_tokens=alignment_tokens,
            **options,
        )
        size = kv_cache_spec.block_size
        block_hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        for index in range(min(kv_cache_spec.sink_blocks, length // size)):
            cached = block_pool.get_cached_block(block_hashes[index], kv_cache_group_ids)
            if not cached:
                kept = index * size // alignment_tokens * alignment_tokens // size
                return tuple(row[:kept] for row in rows), kept * size
            for row, block in zip(rows, cached, strict=True):
                row[index] = block
        return rows, length

    @classmethod
    def reachable_block_mask(cls, start_block, end_block, alignment_tokens, kv_cache_spec, *arguments, **options):
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, *arguments, **options)
        if mask is not None:
            for index in range(start_block, min(end_block, kv_cache_spec.sink_blocks)):
                mask[index - start_block] = True
        return mask


def register_blocks() -> None:
    """Lets vLLM find the manager of the spec. Its own specs come first: it would leave them out if any were registered."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager, uniform_type_base_spec=SinkWindowSpec)
