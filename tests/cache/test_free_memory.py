"""What is free: for all buffers of a cache at once, and no more than what the limits of a container leave."""

import pytest
import torch
from gpu import needs_cuda

from zigzag_ext import _C
from zigzag_ext.attention.buffers import GrowingBuffer, check_free, free_bytes


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_free_memory_is_checked_for_all_buffers_at_once(where):
    buffers = [GrowingBuffer(2, 2, 1 << 35, 64, torch.bfloat16, where) for _ in range(3)]
    buffers[0].commit(300)
    held = [buffer.memory_bytes for buffer in buffers]
    free = free_bytes(torch.device(where))
    slots = int(free * 0.45) // 512  # 2 rows of 256 bytes a slot
    assert buffers[1].growth_bytes(slots) >= slots * 512 - held[1] and buffers[1].growth_bytes(slots, row=1) >= slots * 256
    check_free((buffer, slots) for buffer in buffers[:2])
    with pytest.raises(MemoryError, match=rf"out of memory: [\d,]+ bytes are needed on {where}.*, [\d,]+ are free; nothing"):
        check_free((buffer, slots) for buffer in buffers)
    assert [buffer.memory_bytes for buffer in buffers] == held
    buffers[0].shrink(0)
    check_free((buffer, 10) for buffer in buffers)


CGROUP_2 = {"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "5000", "sys/fs/cgroup/a/memory.current": "1000"}
CGROUP_1 = {
    "proc/self/cgroup": "12:cpu,cpuacct:/x\n4:memory:/job\n0::/\n",
    "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "7000",
    "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "6000",
    "sys/fs/cgroup/memory/job/memory.stat": "cache 900\ntotal_cache 1\ntotal_inactive_file 2500",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
}


@pytest.mark.parametrize(
    "files, free",
    [
        ({}, 10 << 20),
        (CGROUP_2, 4000),
        (CGROUP_2 | {"sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/b/memory.current": "900"}, 4000),
        (CGROUP_2 | {"sys/fs/cgroup/a/b/memory.max": "300", "sys/fs/cgroup/a/b/memory.current": "900"}, 0),
        (CGROUP_2 | {"sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 600\n"}, 4600),
        (CGROUP_1, 3500),
        ({"proc/self/cgroup": "4:memory:/of/the/host\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "77"}, 77),
        ({"proc/self/cgroup": "nonsense\n::\n"}, 10 << 20),
    ],
    ids=["none", "v2", "v2_above", "v2_over", "v2_cached", "v1", "v1_container", "malformed"],
)
def test_limits_of_control_groups_count(tmp_path, files, free):
    for name, text in ({"proc/meminfo": "MemTotal: 99999 kB\nMemAvailable:   10240 kB\nBuffers: 1 kB\n"} | files).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _C.host_free_bytes(str(tmp_path)) == free
    assert 1 << 20 < _C.host_free_bytes() <= 1 << 50
