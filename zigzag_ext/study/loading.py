"""Loading a model of transformers from a folder, a .gguf file or a name."""

import importlib.util
import inspect
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from ..hf.served import auto_class
from ..planning.layers import geometries, text_config
from .weights import check_weights, quantise

_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
_DTYPES = ("auto", "bfloat16", "float16", "float32")


def load_model(
    source: str,
    device: str = "auto",
    dtype: str = "auto",
    device_map: str | None = None,
    tp: bool = False,
    weights: str | None = None,
):
    """Model and tokenizer from a folder (safetensors or one .gguf file), a .gguf file, or a Hugging Face model name.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
        dtype: "auto" (float32 on the CPU; on a GPU the dtype of the file, or bfloat16 for float32), bfloat16, float16 or float32.
        device_map: "auto", "balanced", "balanced_low_0" or "sequential": spread the layers over all GPUs, and where these are
            full over the CPU, as accelerate does; `device` is then left "auto".
        tp: tensor parallelism: share the heads and weights out over the processes that torchrun has started; likewise.
        weights: "int8" or "int4": quantise linear layers once they are read, see `weights.py`. Needs torchao, and one device.

    Raises:
        ValueError: the folder holds no model, several .gguf files or an unreadable one, or the device or dtype is unknown; or the
            processes cannot share the model out, see `check_tensor_parallel`; or its weights cannot be quantised.
        OSError: not found. ModuleNotFoundError: a package for `device_map` or `weights` is not installed.
    """
    if weights is not None and (tp or device_map is not None):
        raise ValueError("weights are quantised on one device: leave the device map and tensor parallelism out")
    device_name, device = device, check_device(device, device_map)
    placed = {} if device_map is None else {"device_map": device_map}
    check_dtype(dtype)
    if tp:
        check_tensor_parallel(source, device_name, device_map)
        placed = shared_out()
    folder, options = _locate(source)
    if weights is not None:
        check_weights(weights, source, load_config(source), dtype)
    with _named(f"the tokenizer of {source}"):
        tokenizer = _tokenizer(folder, options)
    with _named(f"the model {source}"):
        dtype = torch.bfloat16 if weights == "int4" else _dtype(dtype, device, folder, options)
        auto = auto_class(AutoConfig.from_pretrained(folder, **options))
        model = auto.from_pretrained(folder, dtype=dtype, **options, **placed)
    if weights is not None:
        quantise(model, weights, device)
    return (model if placed else model.to(device)).eval(), tokenizer


def load_config(source: str):
    """The config alone of what `load_model` takes, or of a config.json; no weights are read."""
    path = Path(source).expanduser()
    folder, options = _locate(str(path.parent) if path.name == "config.json" else source)
    with _named(f"the config of {source}"):
        try:
            return AutoConfig.from_pretrained(folder, **options)
        except OSError as error:
            if options:  # of a damaged .gguf file transformers says that it is no JSON
                raise ValueError(f"damaged or incomplete ({error})") from error
            raise


def _tokenizer(folder: str, options: dict):
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if options:  # of a .gguf file transformers 5.17 takes the first token for the last one, and knows none for padding
        config = AutoConfig.from_pretrained(folder, **options)
        numbers = {f"{name}_token": getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
        tokens = {name: tokenizer.convert_ids_to_tokens(number) for name, number in numbers.items() if number is not None}
        tokenizer.add_special_tokens(tokens)
    return tokenizer


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


def check_device(name: str, device_map: str | None = None) -> torch.device:
    """The device of that name. Raises ValueError if it is unknown, not there, or given beside a `device_map`."""
    if device_map is not None:
        if device_map not in _DEVICE_MAPS:
            raise ValueError(f"unknown device map '{device_map}'; use {', '.join(_DEVICE_MAPS)}")
        if name != "auto":
            raise ValueError(f"a device map chooses the devices: leave the device auto, got '{name}'")
        if importlib.util.find_spec("accelerate") is None:
            raise ModuleNotFoundError("a device map needs the package accelerate:  pip install accelerate")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device '{name}'; use auto, cpu, cuda or cuda:<number>") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device '{name}' was asked for, but torch {torch.__version__} sees no CUDA GPU")
    return device


def check_tensor_parallel(source: str, device: str = "auto", device_map: str | None = None) -> None:
    """Raises ValueError unless torchrun has started this process, and all of its processes can share the model out."""
    if device != "auto" or device_map is not None:
        raise ValueError("tensor parallelism gives each process a device: leave the device auto and the device map out")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError("tensor parallelism needs a process for each GPU: torchrun --nproc-per-node 2 -m zigzag_ext ... --tp")
    if _locate(source)[1]:
        raise ValueError(f"{source} is a .gguf file, which cannot be shared out: take a folder of safetensors")
    config, processes = load_config(source), int(os.environ["WORLD_SIZE"])
    if not getattr(text_config(config), "base_model_tp_plan", None):
        raise ValueError(f"transformers has no tensor parallel plan for {config.model_type}")
    for size in geometries(config):
        if size.kv_heads % processes:
            raise ValueError(f"{processes} processes cannot share out {size.kv_heads} KV heads: their number has to divide them")


def shared_out() -> dict:
    """What `from_pretrained` takes for tensor parallelism; newer releases of transformers no longer take the plan by itself."""
    from transformers.distributed import DistributedConfig

    if "tp_plan" in inspect.signature(DistributedConfig).parameters:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    return {"tp_plan": "auto"}


def check_dtype(name: str) -> None:
    if name not in _DTYPES:
        raise ValueError(f"unsupported dtype '{name}'; use {', '.join(_DTYPES[:-1])} or {_DTYPES[-1]}")


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
