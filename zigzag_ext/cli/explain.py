"""`zigzag info --explain`: how a decode step's attention would be launched on GPUs that are known by their data sheets."""

import re

from rich.table import Table

from .. import _C

_COLUMNS = {
    "GPU": "gpu",
    "SMs": "sms",
    "blocks": "blocks",
    "warps": "warps",
    "cluster": "cluster",
    "clusters a head": "spread",
    "merge": "merge",
    "shared KB": "shared_bytes",
    "MB read": "bytes",
    "read us": "read_us",
}


def launch_table(shape: str, kv_len: str, kv_format: str = "none") -> Table:
    """One row per GPU of `_C.known_gpus()`.

    `shape` is query heads x KV heads x head_dim, such as "32x8x128"; `kv_len` tokens, K being 1024. The time is that of the
    memory alone. Raises ValueError where either is written otherwise, or no kernel has that shape.
    """
    sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)", shape)
    if sizes is None:
        raise ValueError(f"--explain takes query heads x KV heads x head_dim, such as 32x8x128; got {shape!r}")
    tokens = re.fullmatch(r"(\d{1,7})(K?)", kv_len)
    if tokens is None:
        raise ValueError(f"--kv-len takes tokens, such as 4096 or 32K; got {kv_len!r}")
    length = int(tokens[1]) * (1024 if tokens[2] else 1)
    table = Table(*_COLUMNS, box=None, title=f"one new token over {length} tokens, {shape}, as planned without asking a GPU")
    for gpu in _C.known_gpus():
        plan = _C.decode_plan(gpu, *map(int, sizes.groups()), length, kv_format=kv_format)
        plan |= {"shared_bytes": plan["shared_bytes"] // 1024, "bytes": f"{plan['bytes'] / 1e6:.1f}"}
        plan["read_us"] = f"{plan['read_us']:.1f}"
        table.add_row(*(str(plan[key]) for key in _COLUMNS.values()))
    return table
