"""Plans in EleutherAI's lm-evaluation-harness: its model `zigzag`, a Hugging Face model that runs a plan.

    zigzag lm-eval --model zigzag --model_args pretrained=MODEL,plan=plan.json --tasks ruler_vt \\
        --metadata '{"max_seq_lengths":[4096]}'

lm-eval has no plugins: a model is known once its class is registered. `register()` does that in a Python program.
"""

import functools
import importlib.util
import sys
from pathlib import Path

from ..hf import enable
from ..planning.plan import Plan
from .loading import load_model

# Arguments of lm-eval's model that still mean something once the network is loaded, and are given to it.
_PASSED = (
    "batch_size", "max_batch_size", "max_length", "truncation", "logits_cache", "add_bos_token", "prefix_token_id",
    "softmax_dtype", "think_end_token", "enable_thinking", "chat_template_args",
)  # fmt: skip
_RUNNING = ("compile", "prefill_chunk", "kv_format", "ring_kv_format", "key_smoothing")  # of `enable`
_NAME = "zigzag"


def require_lm_eval() -> None:
    """Raises ModuleNotFoundError with the command that installs it."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError("this needs lm-evaluation-harness:  pip install 'zigzag_ext[ruler]'")


@functools.lru_cache(maxsize=1)
def register() -> type:
    """Makes lm-eval know the model `zigzag`; returns its class. Raises ModuleNotFoundError if lm_eval is not installed.

    Arguments of the class, as Python objects or in --model_args:
        pretrained: what `zigzag eval` takes (folder, .gguf file, model name), or a loaded transformers model.
        plan: plan file, or a Plan; without one the model keeps its own full attention.
        device, dtype: as in `zigzag eval`; unused for a loaded model.
        tokenizer: folder, model name or object; default: the one beside the model.
        compile, prefill_chunk, kv_format, ring_kv_format, key_smoothing: as in `zigzag_ext.enable`.
        batch_size, max_length, chat_template_args ...: as in lm-eval's model `hf`; what concerns loading is refused.
    """
    require_lm_eval()
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    @register_model(_NAME)
    class ZigzagLM(HFLM):
        def __init__(self, pretrained, plan=None, device=None, dtype="auto", tokenizer=None, **options):
            running = {name: options.pop(name) for name in _RUNNING if name in options}
            if unknown := sorted(options.keys() - set(_PASSED)):
                known = ("pretrained", "plan", "device", "dtype", "tokenizer", *_RUNNING, *_PASSED)
                raise ValueError(f"lm-eval's model {_NAME} has no argument {', '.join(unknown)}; it has {', '.join(known)}")
            plan = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
            if plan is None and (given := [name for name, value in running.items() if value]):
                raise ValueError(f"{', '.join(given)} need a plan: without one, the model keeps its own attention")
            if isinstance(pretrained, (str, Path)):
                pretrained, beside = load_model(str(pretrained), device or "auto", dtype)
                tokenizer = tokenizer or beside
            super().__init__(pretrained=pretrained, tokenizer=tokenizer, backend="causal", **options)
            if plan is not None:
                enable(self.model, plan, **running)

    return ZigzagLM


def main(arguments: list[str]) -> None:
    """lm-eval's own command line, which then knows the model `zigzag`."""
    register()
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["zigzag lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
