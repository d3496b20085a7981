"""Names that go with every number: processor, driver, commit."""

import os
import subprocess
from pathlib import Path

import torch


def processor(device: str) -> str:
    """The GPU, or the CPU model and torch's threads; the C++ programs write the same."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")
    threads = torch.get_num_threads()
    return f"{model} ({threads} thread{'s' if threads > 1 else ''})"


def driver(device: str) -> str:
    if device == "cpu":
        return "-"
    words = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return words[0].strip() if words else f"cuda {torch.version.cuda}"


def commit() -> str:
    """ZIGZAG_COMMIT, else what git says, "-dirty" if tracked files differ from it."""
    if os.environ.get("ZIGZAG_COMMIT"):
        return os.environ["ZIGZAG_COMMIT"]
    here = str(Path(__file__).parent)
    return _output("git", "-C", here, "describe", "--always", "--dirty", "--exclude=*").strip() or "unknown"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
