"""Loading a model of transformers from a folder, a .gguf file or a name."""

from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def load_model(source: str, device: str = "auto", dtype: str = "auto"):
    """Model and tokenizer from a folder (safetensors or one .gguf file), a .gguf file, or a Hugging Face model name.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
        dtype: "auto" (float32 on the CPU; on a GPU the dtype of the file, or bfloat16 for float32), bfloat16, float16 or float32.

    Raises:
        ValueError: the folder holds no model, several .gguf files or an unreadable one, or the device or dtype is unknown.
            OSError: not found.
    """
    device = _device(device)
    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"unsupported dtype '{dtype}'; use auto, bfloat16, float16 or float32")
    folder, options = _locate(source)
    with _named(f"the tokenizer of {source}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    with _named(f"the model {source}"):
        dtype = _dtype(dtype, device, folder, options)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return model.to(device).eval(), tokenizer


def load_config(source: str):
    """The config alone of what `load_model` takes, or of a config.json; no weights are read."""
    path = Path(source).expanduser()
    folder, options = _locate(str(path.parent) if path.name == "config.json" else source)
    with _named(f"the config of {source}"):
        return AutoConfig.from_pretrained(folder, **options)


@contextmanager
def _named(part: str):
    """Damaged files fail in transformers, tokenizers and gguf by errors of any type, which name no file."""
    try:
        yield
    except (OSError, ImportError, MemoryError, RuntimeError):
        raise  # not found, not installed, out of memory: these say what they are about
    except SafetensorError as error:
        raise ValueError(f"a safetensors file of {part} is damaged or incomplete: {error}") from error
    except Exception as error:
        raise ValueError(f"{part} cannot be read: {error} ({type(error).__name__})") from error


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
