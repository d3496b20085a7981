"""Which blocks the manager of a streaming layer holds, finds and counts, in random sequences of requests on a small pool."""

import random
from types import SimpleNamespace

import pytest
from installed import MISSING, needs_vllm

if MISSING is None:
    import torch
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from zigzag_ext.vllm.blocks import SinkWindowManager, SinkWindowSpec, register_blocks

pytestmark = needs_vllm
SIZE = 4  # tokens of a block


def spec_of(sink: int, window: int) -> "SinkWindowSpec":
    return SinkWindowSpec(block_size=SIZE, num_kv_heads=1, head_size=64, dtype=torch.float32, sliding_window=window, sink=sink)


def manager_of(spec: "SinkWindowSpec", blocks: int) -> "SinkWindowManager":
    pool = BlockPool(num_gpu_blocks=blocks, enable_caching=True, hash_block_size=SIZE)
    return SinkWindowManager(spec, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=SIZE)


def request_of(name: str, text: list[int]) -> SimpleNamespace:
    hashes = [repr(text[: end + SIZE]).encode() for end in range(0, len(text) - SIZE + 1, SIZE)]
    return SimpleNamespace(request_id=name, tokens=len(text), block_hashes=hashes, shared_prefix_boundary=None)


def found(manager: "SinkWindowManager", request) -> tuple[list, int]:
    (row,), length = manager.find_longest_cache_hit(
        block_hashes=request.block_hashes,
        max_length=request.tokens - 1,
        kv_cache_group_ids=[0],
        block_pool=manager.block_pool,
        kv_cache_spec=manager.kv_cache_spec,
        drop_eagle_block=False,
        alignment_tokens=SIZE,
    )
    return row, length


def needed(spec: "SinkWindowSpec", tokens: int) -> set[int]:
    """Blocks with a token that the next one of a request sees, or a later one."""
    seen = [place for place in range(tokens) if place < spec.sink or place > tokens - spec.sliding_window]
    return {place // SIZE for place in seen}


def best_prefix(manager: "SinkWindowManager", request) -> int:
    """By trying every length: the most tokens of a request all of whose needed blocks are cached."""
    cached = [manager.block_pool.get_cached_block(each, [0]) is not None for each in request.block_hashes]
    lengths = range(0, request.tokens, SIZE)
    whole = [length for length in lengths if all(cached[block] for block in needed(manager.kv_cache_spec, length))]
    return max(length for length in whole if length == 0 or cached[length // SIZE - 1])


def admit(manager: "SinkWindowManager", request) -> bool:
    """What vLLM's coordinator does for a request that comes; False where the pool has too few blocks."""
    row, length = found(manager, request)
    assert length == best_prefix(manager, request) and len(row) * SIZE == length
    for block in needed(manager.kv_cache_spec, length):
        assert row[block].block_hash == make_block_hash_with_group_id(request.block_hashes[block], 0)
    need = manager.get_num_blocks_to_allocate(request.request_id, request.tokens, row, length, length, request.tokens)
    before = manager.block_pool.get_num_free_blocks()
    if need > before:
        return False
    manager.add_local_computed_blocks(request.request_id, row, length, 0)
    manager.allocate_new_blocks(request.request_id, request.tokens, request.tokens)
    assert before - manager.block_pool.get_num_free_blocks() == need
    manager.cache_blocks(request, request.tokens, replay_boundaries=())
    return True


@pytest.mark.parametrize("sink, window", [(0, 9), (1, 1), (4, 8), (6, 9), (9, 4), (12, 40)])
def test_blocks_in_random_sequences(sink, window):
    draw, spec = random.Random(sink + window), spec_of(sink, window)
    manager, running, hits, full = manager_of(spec, 22), [], 0, 0
    start = manager.block_pool.get_num_free_blocks()
    stories = [[draw.randint(0, 1) for _ in range(60)] for _ in range(3)]
    for step in range(400):
        story = draw.choice(stories)[: draw.randint(1, 60)]
        request = request_of(str(step), story + [draw.randint(2, 99) for _ in range(draw.randint(1, 12))])
        hits += found(manager, request)[1] > 0
        if admit(manager, request):
            running.append(request)
            manager.remove_skipped_blocks(request.request_id, request.tokens)
            held = {place for place, block in enumerate(manager.req_to_blocks[request.request_id]) if not block.is_null}
            begun = {request.tokens // SIZE} if request.tokens % SIZE else set()  # the next token comes into it
            assert held == needed(spec, request.tokens) | begun
        else:
            full += 1
        while running and (draw.random() < 0.3 or len(running) > 5):
            manager.free(running.pop(draw.randrange(len(running))).request_id)
    for request in running:
        manager.free(request.request_id)
    assert manager.block_pool.get_num_free_blocks() == start
    assert hits > 50 and full > 0


def test_a_prefix_without_its_sink_is_none():
    """The blocks of the window are there, a block of the sink went to another request."""
    manager = manager_of(spec_of(sink=8, window=5), 40)
    first, again = request_of("a", [*range(40)]), request_of("b", [*range(40)])
    admit(manager, first)
    manager.remove_skipped_blocks("a", 40)
    kept = manager.req_to_blocks["a"]
    assert [block.is_null for block in kept] == [False] * 2 + [True] * 7 + [False]
    manager.free("a")
    assert found(manager, again)[1] == 36  # its own last token is computed again, so its last block is not asked for
    manager.block_pool.evict_blocks({kept[1].block_id})
    assert found(manager, again) == (found(manager, again)[0], SIZE)  # one block is a prefix: all of it is sink
    manager.block_pool.evict_blocks({kept[0].block_id})
    assert found(manager, again) == ([], 0)


def test_sparse_retention_keeps_sinks():
    """vLLM may be told to cache few blocks of a window (`--prefix-cache-retention-interval`): those of the sink, too."""
    spec = spec_of(sink=6, window=5)
    mask = SinkWindowManager.reachable_block_mask(
        0, 8, SIZE, spec, use_eagle=False, retention_interval=0, reachable_boundaries=(31,)
    )
    assert mask == [True, True, False, False, False, False, True, False]


def test_specs_are_told_apart_and_have_their_manager():
    register_blocks()
    register_blocks()  # plug-ins may be loaded more than once
    one, other = spec_of(4, 8), spec_of(0, 8)
    assert KVCacheSpecRegistry.get_manager_class(one) is SinkWindowManager
    assert one.is_uniform_with_collection({"a": one}) and not one.is_uniform_with_collection({"a": one, "b": other})
    assert not one.is_uniform_with_collection({"a": one, "b": spec_of(4, 9)})
    assert one.max_admission_blocks_per_request(100, 1000) == other.max_admission_blocks_per_request(100, 1000) + 1
    assert one.max_admission_blocks_per_request(100, 20) == 6
