"""A plugin for vLLM: plans in an engine with tensor and pipeline parallelism, several machines and a server. Experimental.

vLLM finds `register` by its entry point (pyproject.toml) in each of its processes. `zigzag vllm-args plan.json` prints what makes
`vllm serve` run a plan, `overrides(plan)` is the same for `vllm.LLM(model, hf_overrides=overrides(plan))`. This file and
`plans.py` need no vLLM; the others are written for the internals of the versions in `TESTED`, which change from minor to minor.
"""

import logging

from .plans import ARCHITECTURES, arguments, overrides, plan_of, stock_overrides

TESTED = ("0.32",)  # minor versions of vLLM

__all__ = ["TESTED", "arguments", "overrides", "plan_of", "register", "stock_overrides"]


def unsupported(version: str) -> str | None:
    """Why a version of vLLM cannot run plans; None if it can."""
    if ".".join(version.split(".")[:2]) in TESTED:
        return None
    return f"zigzag_ext's plugin for vLLM was tested with vLLM {', '.join(TESTED)}, this is {version}: it cannot run plans here"


def require_tested() -> None:
    """Raises ImportError that names the tested versions, unless vLLM is here and is one of them."""
    try:
        from vllm.version import __version__
    except ModuleNotFoundError as error:
        raise ImportError(f"zigzag_ext.vllm needs vLLM {', '.join(TESTED)}: pip install 'zigzag_ext[vllm]'") from error
    if reason := unsupported(__version__):
        raise ImportError(reason)


def register() -> None:
    """Makes vLLM know the architectures that `overrides` names. Under an untested version it says so, and vLLM stays as it is."""
    from vllm.version import __version__

    if reason := unsupported(__version__):
        logging.getLogger(__name__).warning(reason)
        return
    from vllm import ModelRegistry

    from .blocks import register_blocks

    register_blocks()
    for name in ARCHITECTURES.values():
        ModelRegistry.register_model(name, f"{__name__}.model:{name}")
