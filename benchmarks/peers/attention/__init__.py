"""Attention kernels that decode is timed against, and our own, one file each. A file holds:

    DEVICES = ("cuda",)            # where it runs
    KV_FORMATS = ("fp8",)          # quantised caches that it reads; without this line none
    def prepare(problem):          # imports its library here: a missing one is reported, not fatal
        ...                        # raises problem.Unsupported for cells it cannot serve
        return run                 # run(set) -> output [batch, num_q_heads, q_len, head_dim], nothing but the timed work

A new peer is one new file; its name is its name in the results. Files that start with an underscore are shared code.
"""

import importlib
import pkgutil
from types import ModuleType


def for_device(device: str) -> dict[str, ModuleType]:
    """Peer modules that run on "cuda" or "cpu", by name; ours first."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    names.sort(key=lambda name: name != "zigzag")
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if device in module.DEVICES}
