"""enable(model, plan): zigzag attention and a ZigzagCache behind every forward of a Hugging Face causal language model.

No code of transformers is replaced. The attention and mask functions are registered through transformers' public interfaces;
`model.forward` and `model.generate` become objects in front of the former ones, see `session.py`.
"""

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..cache import ZigzagCache
from ..cache.compression import PromptCompression
from ..cache.state import check_lengths
from ..planning.kv_format import KvFormat
from ..planning.native import plan_for
from ..planning.origin import origin_of, other_model
from ..planning.plan import Plan
from .cache_argument import cache_parameter, warn_if_untested
from .chunking import check_chunk
from .compiled import check_compilable
from .families import check_family, check_smoothing
from .own_config import exchange_configs, use_former, use_zigzag
from .session import Session, session_of


def enable(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    max_len: int | None = None,
    rollback: int = 0,
    prefill_chunk: int | str | None = "auto",
    compile: bool = False,
    compress: PromptCompression | None = None,
    kv_format: KvFormat | str | dict[str, str] | None = None,
    ring_kv_format: KvFormat | str | dict[str, str] | None = None,
    key_smoothing: bool | None = None,
) -> nn.Module:
    """Makes `model` run the plan: after this `model.generate(...)` keeps full caches for retrieval layers, rings for the others.

    Args:
        model: a transformers decoder-only language model (`AutoModelForCausalLM`) or an image-text model around one
            (`AutoModelForImageTextToText`), of which the text decoder is served and other parts attend as before; also inside
            PEFT's wrappers or `torch.compile(model)`. Served exactly or refused: see Raises. It gets a config of its own.
        plan: `zigzag_ext.Plan` with one kind per layer, sliding windows of the model's own as native layers, layers without keys
            as state layers (`Plan.with_native`). None: the model as it is, exactly, with rings for its native windows. Where a
            plan records what it was made for (`Plan.origin`), the model has to have that geometry; a model of another name is
            warned of once.
        max_len: tokens per row of the caches made for calls without one; None lets them grow.
        rollback: tokens that these caches can take back (`ZigzagCache.crop`), unless layers hold states. Assisted and
            prompt-lookup decoding need it: 20 is transformers' longest draft by default.
        prefill_chunk: most new tokens per row that go through the model at once, in forwards that ask for the logits of the last
            tokens only, as generate() does. Peak memory beside the KV then does not depend on the prompt; the result is that of
            one shot, in every turn of a conversation. "auto": from the free memory, at most 8192 tokens over all rows, where
            the model and the arguments of the call can be cut. None: one shot. A prompt with images is one shot, too.
        compile: run each decode step (one new token per row) as one compiled graph, on a GPU as one captured CUDA graph; prompts
            stay eager. See below.
        compress: let retrieval layers of these caches keep only a part of each prompt, for one `PromptWindows(budget=0.12)`.
            Memory and reads shrink; what a later question needs may be gone. None: they keep all.
        kv_format, ring_kv_format, key_smoothing: in the place of the plan's, for the caches made for calls without one; None: the
            plan's. "none" is the model's dtype.

    Greedy search, sampling, beams, padded batches, `prefill_chunk_size` and several turns with one cache work as usual. Pass
    `cache=ZigzagCache(model.config, plan, max_len)` to keep a cache; its plan then wins. (`past_key_values=` means the same.)
    Behind a prompt with images a kept cache goes on with what begins with all of that prompt, its images left out of the call;
    `reset()` it for others. Where the tokens of one image see each other (Gemma 3), a prompt with images raises ValueError.
    Under tensor parallelism (`tp_plan="auto"`, a process for each GPU, all running one program) all of them choose the same
    tokens: random numbers, and what stopping criteria say, are those of the first one.
    Inference only. Tested with transformers 5.4 to 5.24; a newer one is warned of once.

    With `compile=True` the first step compiles, which takes from seconds to minutes; after that a step costs the host almost
    nothing, whatever the context length. Compiled again: for the second batch size (all later ones share that graph), for
    another plan, and where the arguments of the forward differ. On a GPU the graph is also captured (about a second) for each
    cache that is new, changes its batch size, or grows: give `max_len`, and it is captured once. Calls without a cache use
    the memory of the last such cache that is gone, so one capture serves one prompt after the other; `disable` frees it.
    Tokens agree with eager ones up to the rounding of compiled kernels.

    Returns:
        The model, for chaining. `disable(model)` undoes it.

    Raises:
        TypeError: `model` is no transformers model, `plan` no Plan, `max_len` or `prefill_chunk` no integer, `compile` no bool, a
            format or `key_smoothing` of another type than in `Plan`.
        ValueError: layer counts or native windows differ, or layers, KV heads or head_dim from those that the plan was made for;
            `max_len` or `prefill_chunk` < 1, the dtype or a format is not supported, `key_smoothing` without quantised keys, or
            the family cannot be computed exactly (chunked or latent attention, states in caches of the family's own, encoders,
            unsupported head_dim or group size, key_smoothing with soft caps or learned sinks). With `compile`: several devices,
            or RoPE whose frequencies follow the length ("dynamic", "longrope").
        RuntimeError: already enabled, or the model does not take its attention from transformers' AttentionInterface, or its
            forward takes no cache. From the first forward: its layers do not get the cache. With `compile`, from the first step:
            the model's step cannot be one graph (for one, `output_hidden_states=True` cannot).

    Source: ZigzagAttention (https://arxiv.org/abs/2508.12407).
    """
    if not (isinstance(model, nn.Module) and hasattr(model, "config") and hasattr(model, "set_attn_implementation")):
        raise TypeError(f"model must be a transformers language model (AutoModelForCausalLM), got a {type(model).__name__}")
    if not isinstance(plan, Plan | None):
        raise TypeError(f"plan must be a zigzag_ext.Plan (Plan.load(path) reads a plan file) or None, got {plan!r}")
    given, model = model, served_model(model)
    if session_of(model) is not None:
        raise RuntimeError("zigzag attention is already enabled on this model: call zigzag_ext.disable(model) first")
    if not isinstance(compile, bool):
        raise TypeError(f"compile must be True or False, got {compile!r}")
    max_len, rollback = check_lengths(max_len, rollback)
    warn_if_untested()
    check_family(model)
    cache_parameter(model)
    prefill_chunk = check_chunk(model, prefill_chunk)
    if compile:
        check_compilable(model)
    plan = plan_for(model.config, plan).with_formats(kv_format, ring_kv_format, key_smoothing)
    check_smoothing(model, plan)
    cache_options = {"max_len": max_len, "rollback": rollback, "compress": compress}
    ZigzagCache(model.config, plan, **cache_options)
    if other_model(plan.origin, origin := origin_of(model.config)):
        _warn_of_other_model(plan.origin["model"], origin["model"])
    undo: dict = {}
    try:
        use_zigzag(given, model, undo)
        Session(model, plan, cache_options, prefill_chunk, compile)
    except BaseException:
        if (session := session_of(model)) is not None:
            session.remove()
            session.close()
        exchange_configs(given, undo, {})
        raise
    return given


@functools.cache
def _warn_of_other_model(scored: str, name: str) -> None:
    """Warns the caller of the caller, once per process and pair of models."""
    warnings.warn(f"the plan was made for {scored}, the model is {name}: scores say nothing about another model", stacklevel=3)


def disable(model: nn.Module) -> nn.Module:
    """Gives `model` its former attention back. Raises RuntimeError if `enable` was not called on it. Returns the model."""
    inner = served_model(model)
    session = session_of(inner)
    if session is None:
        raise RuntimeError("zigzag attention is not enabled on this model")
    session.remove()
    use_former(inner)
    session.close()  # last: until then an interrupted `disable` may be called again
    return model


def served_model(model: nn.Module) -> nn.Module:
    """The transformers model behind torch.compile(model) and PEFT's wrappers, which call its forward and its generate."""
    while isinstance(model, nn.Module):
        if (compiled := vars(model).get("_modules", {}).get("_orig_mod")) is not None:
            model = compiled
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            kind = model.active_peft_config
            if kind.is_prompt_learning:
                raise ValueError(f"{kind.peft_type.value} adapters keep keys of their own; use LoRA, or merge the adapter")
            model = model.get_base_model()
        else:
            break
    return model


@contextmanager
def zigzag(model: nn.Module, plan: Plan | None = None, **options):
    """`with zigzag(model, plan): model.generate(...)`: `enable` at the start, `disable` at the end. Options as in `enable`."""
    with given_back(model):
        enable(model, plan, **options)
        yield model
        disable(model)


@contextmanager
def given_back(model: nn.Module) -> Iterator[None]:
    """Of a model that the block enables: whatever fails in the block, an interrupt included, disables it."""
    former = _session(model)
    try:
        yield
    except BaseException:
        if _session(model) is not former:
            disable(model)
        raise


def _session(model) -> Session | None:
    return session_of(served_model(model)) if isinstance(model, nn.Module) else None
