"""zigzag_ext: attention kernels and caches for models whose layers are either retrieval (full KV) or streaming (sink + window).

import zigzag_ext as zz
plan = zz.load_plan("meta-llama/Llama-3.1-8B-Instruct", retrieval_ratio=0.5)  # or zz.solve(zz.load_scores(...), ...)
zz.enable(model, plan)          # any supported Hugging Face causal LM
model.generate(**inputs)        # streaming layers now hold sink + window tokens, whatever the length
"""

from importlib import import_module
from pathlib import Path

try:
    from . import _C
except ImportError:
    _folder = Path(__file__).parent
    if any(_folder.glob("_C.*.so")):  # built, and the system says why it cannot be loaded
        raise
    raise ImportError(
        f"{_folder} is a source folder of zigzag_ext without compiled modules, and Python looks there first: start Python in "
        f"another folder to use the zigzag_ext that is installed, or build this one: pip install -e {_folder.parent}"
    ) from None
from .planning import exchange
from .planning.gallery import load_plan
from .planning.native import native_windows
from .planning.plan import Plan
from .planning.scores import load_scores, save_scores
from .planning.solve import objectives, solve

build_info = _C.build_info
__version__: str = build_info()["version"]

# Names that need torch or transformers, by module, imported at first use: plans and the solver need numpy only.
_LAZY = {
    "ChunkKV": "cache.compression",
    "PromptWindows": "cache.compression",
    "PyramidKV": "cache.compression",
    "RecentOnly": "cache.compression",
    "SnapKV": "cache.compression",
    "Completion": "serve",
    "Engine": "serve",
    "EngineStopped": "serve",
    "QueueFull": "serve",
    "RequestTooLarge": "serve",
    "Sampling": "serve",
    "ZigzagAttention": "attention.module",
    "ZigzagCache": "cache",
    "disable": "hf",
    "enable": "hf",
    "identify": "study.identify",
    "prefill_options": "attention.routes",
    "speculate": "speculation",
    "zigzag": "hf",
}
_LAZY_MODULES = {"evaluate": "study.evaluate", "ops": "attention.ops", "reference": "attention.reference"}

__all__ = [
    "ChunkKV",
    "Completion",
    "Engine",
    "EngineStopped",
    "Plan",
    "PromptWindows",
    "PyramidKV",
    "QueueFull",
    "RecentOnly",
    "RequestTooLarge",
    "Sampling",
    "SnapKV",
    "ZigzagAttention",
    "ZigzagCache",
    "build_info",
    "disable",
    "enable",
    "evaluate",
    "exchange",
    "identify",
    "load_plan",
    "load_scores",
    "native_windows",
    "objectives",
    "ops",
    "prefill_options",
    "reference",
    "save_scores",
    "solve",
    "speculate",
    "zigzag",
]


def __getattr__(name: str):
    module = _LAZY.get(name) or _LAZY_MODULES.get(name)
    if module is None:
        raise AttributeError(f"module 'zigzag_ext' has no attribute '{name}'")
    try:
        found = import_module(f".{module}", __name__)
    except ModuleNotFoundError as error:
        if error.name == "transformers":
            raise ImportError(f"zigzag_ext.{name} needs transformers >= 5.4: pip install 'zigzag_ext[hf]'") from error
        raise
    return found if name in _LAZY_MODULES else getattr(found, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
