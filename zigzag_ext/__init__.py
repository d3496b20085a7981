"""zigzag_ext: attention kernels and caches for models whose layers are either retrieval (full KV) or streaming (sink + window).

import zigzag_ext as zz
plan = zz.solve(zz.load_scores("attn_patterns/model"), retrieval_ratio=0.5, sink=64, window=256)
zz.enable(model, plan)          # any supported Hugging Face causal LM
model.generate(**inputs)        # streaming layers now hold sink + window tokens, whatever the length
"""

from importlib import import_module

from . import exchange, ops, reference
from ._C import build_info
from .identify import identify
from .modules import ZigzagAttention
from .plan import Plan
from .prefill import prefill_options
from .scores.io import load_scores, save_scores
from .solve import objectives, solve

__version__: str = build_info()["version"]

# Names that need transformers, imported at first use so that the kernels work without it.
_HF_NAMES = {"ZigzagCache": "cache", "enable": "hf", "disable": "hf", "zigzag": "hf"}

__all__ = [
    "Plan",
    "ZigzagAttention",
    "ZigzagCache",
    "build_info",
    "disable",
    "enable",
    "evaluate",
    "exchange",
    "identify",
    "load_scores",
    "objectives",
    "ops",
    "prefill_options",
    "reference",
    "save_scores",
    "solve",
    "zigzag",
]


def __getattr__(name: str):
    if name == "evaluate":  # a subpackage that needs torch and transformers
        return import_module(".evaluate", __name__)
    if name not in _HF_NAMES:
        raise AttributeError(f"module 'zigzag_ext' has no attribute '{name}'")
    try:
        module = import_module(f".{_HF_NAMES[name]}", __name__)
    except ModuleNotFoundError as error:
        if error.name == "transformers":
            raise ImportError(f"zigzag_ext.{name} needs transformers >= 5.4: pip install 'zigzag_ext[hf]'") from error
        raise
    return getattr(module, name)
