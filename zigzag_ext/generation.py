"""Loading a model and one timed greedy generation with a plan: what the command line and the demo share. Needs transformers."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer

from .cache import ZigzagCache
from .hf import zigzag
from .hf.cache_argument import cache_argument
from .plan import Plan


@dataclass(frozen=True)
class Generation:
    """What one generation gave and cost. Times are wall-clock seconds; the first new token belongs to the prefill."""

    text: str
    prompt_tokens: int
    new_tokens: int
    prefill_seconds: float
    seconds_per_token: float  # of the tokens after the first; NaN if there is only one
    cache_bytes: int
    cache_report: str  # bytes by kind of layer and format


def full_plan(num_layers: int) -> Plan:
    """Every layer keeps every token: full attention through the same kernels, to compare a plan with."""
    return Plan(["retrieval"] * num_layers, sink=0, window=1, provenance={"source": "full attention"})


def load_model(source: str, device: str = "auto", dtype: str = "auto"):
    """Model and tokenizer from a folder (safetensors or one .gguf file), a .gguf file, or a Hugging Face model name.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
        dtype: "auto" (float32 on the CPU; on a GPU the dtype of the file, or bfloat16 for float32), bfloat16, float16 or float32.

    Raises:
        ValueError: the folder holds no model, several .gguf files or a damaged file, or the device or dtype is unknown.
            OSError: not found.
    """
    device = _device(device)
    folder, options = _locate(source)
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(dtype, device, folder, options), **options)
    except SafetensorError as error:
        raise ValueError(f"a safetensors file of {source} is damaged or incomplete: {error}") from error
    return model.to(device).eval(), tokenizer


class _Clock(TextStreamer):
    """Notes when each token arrives, and hands finished words to `show` if there is one."""

    def __init__(self, tokenizer, show: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.arrivals = show, []

    def put(self, value):
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            return
        self.arrivals.append(time.perf_counter())
        if self.show is not None:
            super().put(value)

    def end(self):
        if self.show is not None:
            super().end()

    def on_finalized_text(self, text: str, stream_end: bool = False):
        self.show(text)


@torch.inference_mode()
def generate(
    model, tokenizer, prompt: str, plan: Plan, max_new_tokens: int, show=None, compile: bool = False, **options
) -> Generation:
    """Continues `prompt` with `plan`, greedily unless `options` for `model.generate` say otherwise.

    The cache is made for exactly this prompt and answer, so `cache_bytes` is what this context needs.

    Args:
        show: called with pieces of text as they are finished.
        compile: as in `zigzag_ext.enable`; the times then include that of compiling.

    Raises:
        ValueError: plan and model do not fit, or the prompt is empty. What `zigzag_ext.enable` raises.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    prompt_tokens = inputs["input_ids"].shape[1]
    if not prompt_tokens:
        raise ValueError("the prompt is empty")
    cache = ZigzagCache(model.config, plan, max_len=prompt_tokens + max_new_tokens)
    clock = _Clock(tokenizer, show)
    options = {"do_sample": False} | options
    with zigzag(model, plan, compile=compile):
        start = time.perf_counter()
        options |= cache_argument(model, cache)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=clock, **options)
    new = output[0, prompt_tokens:]
    steps = len(clock.arrivals) - 1
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=prompt_tokens,
        new_tokens=len(new),
        prefill_seconds=clock.arrivals[0] - start,
        seconds_per_token=(clock.arrivals[-1] - clock.arrivals[0]) / steps if steps else float("nan"),
        cache_bytes=cache.memory_bytes(),
        cache_report=cache.memory_report(),
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device '{name}'; use auto, cpu, cuda or cuda:<number>") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device '{name}' was asked for, but torch {torch.__version__} sees no CUDA GPU")
    return device


def _dtype(name: str, device: torch.device, folder: str, options: dict) -> torch.dtype:
    if name != "auto":
        if name not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"unsupported dtype '{name}'; use auto, bfloat16, float16 or float32")
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    saved = getattr(AutoConfig.from_pretrained(folder, **options), "dtype", None)
    return saved if saved in (torch.bfloat16, torch.float16) else torch.bfloat16


def _locate(source: str) -> tuple[str, dict]:
    """What `from_pretrained` has to be given: a folder or name, and the .gguf file in it if that is where the weights are."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if not path.is_dir():
        if path.suffix == ".gguf" or path.is_absolute() or source.startswith((".", "~")):
            raise FileNotFoundError(f"there is no model at {source}")
        return source, {}
    if (path / "config.json").exists():
        return str(path), {}
    files = sorted(file.name for file in path.glob("*.gguf"))
    if len(files) != 1:
        found = f"{len(files)} .gguf files ({', '.join(files)}): name one" if files else "neither config.json nor a .gguf file"
        raise ValueError(f"{path} holds {found}")
    return str(path), {"gguf_file": files[0]}


def cache_folder() -> Path:
    """Where converted models are kept: $XDG_CACHE_HOME/zigzag_ext, by default ~/.cache/zigzag_ext."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zigzag_ext"
