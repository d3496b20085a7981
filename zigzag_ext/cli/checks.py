"""What commands look at before they load a model: minutes of loading must not end in an error that was there from the start."""

from pathlib import Path

import torch.distributed as dist

from ..cache import ZigzagCache
from ..cache.saved import check_file
from ..planning.native import native_windows, whole_plan
from ..planning.plan import Plan
from ..planning.writing import check_writable
from ..speculation import speculate
from ..study.loading import check_device, check_dtype, check_tensor_parallel, load_config


def check_options(device: str, dtype: str, device_map: str | None, draft: str | None = None, *outputs: Path | None) -> None:
    """Raises what loading, drafting or writing would raise later."""
    check_device(device, device_map)
    check_dtype(dtype)
    if draft is not None:
        speculate(draft)
    for path in outputs:
        if path is not None:
            check_writable(path)


def plans_for(model: str, paths: dict[str, Path | None], formats: tuple) -> dict[str, Plan]:
    """The plans of these files by name, of full attention for None, with other formats; each fits the config of the model."""
    plans = {name: Plan.load(path) for name, path in paths.items() if path is not None}
    config = load_config(model)
    full = whole_plan(native_windows(config))
    plans = {name: plans.get(name, full).with_formats(*formats) for name in paths}
    for plan in plans.values():
        ZigzagCache(config, plan)
    return plans


def check_saved(path: Path, model: str, given: dict) -> None:
    """Raises ValueError unless a cache file is one of this model. given: options that have to be left out beside it."""
    if beside := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"--load-cache brings the plan and formats that the text was read with: leave out {', '.join(beside)}")
    check_file(path, load_config(model))


def check_shared_out(model: str, device: str, device_map: str | None, prompt: str | None, given: dict) -> None:
    """Raises ValueError unless all processes of torchrun can run the same command. given: options that are not served there."""
    check_tensor_parallel(model, device, device_map)
    if prompt is None:
        raise ValueError("--tp needs --prompt: the processes of torchrun have one standard input")
    if beside := [name for name, value in given.items() if value is not None]:
        raise ValueError(f"with --tp each process has a part of the cache, which is not written or read: leave out {beside[0]}")


def end_together() -> None:
    """The last thing that processes of tensor parallelism do; NCCL warns without it."""
    if dist.is_initialized():
        dist.destroy_process_group()
