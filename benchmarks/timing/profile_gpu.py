"""What the GPU does during a call: time of its kernels and number of launches."""

from collections.abc import Callable

import torch


def wait(model) -> None:
    """Until the GPU has done all work, if the model is on one."""
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def profiled(run: Callable[[], object], on_gpu: bool) -> tuple[float, float]:
    """Runs `run()`. Milliseconds of kernels and copies on the GPU, and how many; (0, 0) without one."""
    if not on_gpu:
        run()
        return 0.0, 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
    device = torch.autograd.DeviceType.CUDA
    events = [e for e in profile.events() if e.device_type == device and not getattr(e, "is_user_annotation", False)]
    return sum(e.time_range.elapsed_us() for e in events) * 1e-3, float(len(events))
