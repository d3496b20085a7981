"""`zigzag info --explain`: how a decode step's attention would be launched on GPUs that are known by their data sheets."""

import re

from rich.table import Column, Table

from .. import _C

_COLUMNS = {  # heading -> key of a plan
    "GPU": "gpu",
    "SMs": "sms",
    "blocks": "blocks",
    "warps": "warps",
    "cluster": "cluster",
    "spread": "spread",
    "merge": "merge",
    "KB": "shared_bytes",
    "MB": "bytes",
    "us": "read_us",
}


def launch_table(shape: str, kv_len: str, kv_format: str = "none") -> Table:
    """One row per GPU of `_C.known_gpus()`: blocks, warps a block, blocks a cluster, clusters a KV head, how parts are merged,
    KB of shared memory a block, MB of keys and values and the us that the memory alone takes for them.

    `shape` is query heads x KV heads x head_dim, such as "32x8x128"; `kv_len` tokens, K being 1024. Raises ValueError where
    either is written otherwise, or no kernel has that shape.
    """
    sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)", shape)
    if sizes is None:
        raise ValueError(f"--explain takes query heads x KV heads x head_dim, such as 32x8x128; got {shape!r}")
    tokens = re.fullmatch(r"(\d{1,7})(K?)", kv_len)
    if tokens is None:
        raise ValueError(f"--kv-len takes tokens, such as 4096 or 32K; got {kv_len!r}")
    length = int(tokens[1]) * (1024 if tokens[2] else 1)
    title = f"One new token over {length} tokens, {shape}, {kv_format}; KB of shared memory a block, MB and us to read"
    table = Table(*(Column(name, no_wrap=True) for name in _COLUMNS), box=None, pad_edge=False, title=title)
    for gpu in _C.known_gpus():
        plan = _C.decode_plan(gpu, *map(int, sizes.groups()), length, kv_format=kv_format)
        plan |= {"shared_bytes": plan["shared_bytes"] // 1024, "bytes": f"{plan['bytes'] / 1e6:.1f}"}
        plan["read_us"] = f"{plan['read_us']:.1f}"
        table.add_row(*(str(plan[key]) for key in _COLUMNS.values()))
    return table
