"""`zigzag vllm-args`: a plan as arguments of `vllm serve`."""

import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .app import app, one_line_errors


@app.command("vllm-args")
@one_line_errors
def vllm_args(
    plan: Annotated[Path, typer.Argument(help="Plan file.")],
    experts: Annotated[bool, typer.Option("--experts", help="The model is a mixture of experts.")] = False,
    stock: Annotated[
        bool, typer.Option("--stock", help="For a vLLM without zigzag_ext: layers that stream keep a window only, no sinks.")
    ] = False,
) -> None:
    """Print the arguments with which vLLM runs a plan: args=$(zigzag vllm-args plan.json) && vllm serve MODEL $args

    They say what vLLM's copy of the model's config gets, and have no character that a shell changes. Without --stock vLLM needs
    zigzag_ext beside it (pip install 'zigzag_ext[vllm]'), which is experimental.
    """
    from ..planning.plan import Plan
    from ..vllm import arguments, overrides, stock_overrides

    if stock and experts:
        raise ValueError("--experts is for zigzag_ext's plugin, leave it out with --stock")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entries = stock_overrides(Plan.load(plan)) if stock else overrides(Plan.load(plan), experts=experts)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    print(*arguments(entries))
