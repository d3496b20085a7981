"""Builds the package by CMake, which alone knows the sources, the flags and whether there is an nvcc.

Environment: ZIGZAG_CUDA=auto|on|off (default auto: CUDA kernels where nvcc is found), ZIGZAG_CUDA_ARCHS="80;90a" or "all", the
list in CMakeLists.txt (default: what the GPUs of this machine need; all where there is none), MAX_JOBS (parallel compilations,
default: the number of cores), ZIGZAG_BUILD_DIR (a folder to build in step by step, as the Makefile does; default: a build from
nothing every time, in setuptools' folder for temporary files).
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).parent.absolute()


def long_description(text, version, repository):
    """The README for an index, which knows neither its neighbours nor its pictures.

    Links to files lead to `repository` at the tag of this version, pictures to their bytes there; without a repository (None) a
    link becomes its text and a picture goes.
    """
    at = repository and f"{repository.rstrip('/')}/{{}}/v{version.partition('+')[0]}/"
    relative = r"(?!\w+:|#)([^)\s]+)"
    text = re.sub(rf"!\[([^]]*)\]\({relative}\)\n?", rf"![\1]({at.format('raw')}\2)\n" if at else "", text)
    return re.sub(rf"(?<!!)\[([^]]*)\]\({relative}\)", rf"[\1]({at.format('blob')}\2)" if at else r"\1", text)


class Metadata(egg_info):
    """Rewrites the long description once version and repository are known."""

    def finalize_options(self):
        super().finalize_options()
        metadata = self.distribution.metadata
        repository = (metadata.project_urls or {}).get("Repository")
        metadata.long_description = long_description(metadata.long_description, self.egg_version, repository)


class CMakeBuild(build_ext):
    def run(self):
        target = ROOT / "zigzag_ext" if self.inplace else Path(self.build_lib).absolute() / "zigzag_ext"
        kept = os.environ.get("ZIGZAG_BUILD_DIR")
        archs = cuda_archs(os.environ.get("ZIGZAG_CUDA_ARCHS"), _compute_capabilities())
        print(f"zigzag_ext: CUDA kernels, where nvcc is found, for {archs or 'all architectures'}", flush=True)
        build = Path(kept or self.build_temp).absolute()
        # pip builds in this folder again and again, each time with other temporary tools: no cache may outlive a build.
        fresh = [] if kept else ["--fresh"]
        run = lambda *command: subprocess.run([*_cmake(), *map(str, command)], check=True)  # noqa: E731
        run("-S", ROOT, "-B", build, "-G", "Ninja", *fresh, "-DZIGZAG_BUILD_PYTHON=ON", *self._options(archs))
        run("--build", build, "--parallel", os.environ.get("MAX_JOBS") or os.cpu_count(), "--target", "_ops", "_C")
        run("--install", build, "--component", "python", "--prefix", target)

    def _options(self, archs):
        """Every setting on every call: an unset variable means the default, not what the build folder remembers."""
        ninja = _ninja()
        return [
            f"-DZIGZAG_CUDA={os.environ.get('ZIGZAG_CUDA') or 'auto'}",
            f"-DZIGZAG_CUDA_ARCHS={archs}" if archs else "-UZIGZAG_CUDA_ARCHS",
            *([f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            # What was found of another Python, which one folder may have built for before.
            *("-UPython_*", "-U_Python_*", "-UPYTHON_*", "-UPYBIND11_*", "-Upybind11_*"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DZIGZAG_VERSION={self.distribution.get_version()}",
        ]

    def get_outputs(self):
        """The libraries in build_lib; for an editable install, where they would be."""
        folder = ROOT / "zigzag_ext" if self.inplace else Path(self.build_lib) / "zigzag_ext"
        return [str(Path(self.build_lib) / "zigzag_ext" / library.name) for library in folder.glob("*.so")]

    def get_output_mapping(self):
        """What a strict editable install links: path in build_lib -> path in the source folder."""
        return {output: str(ROOT / "zigzag_ext" / Path(output).name) for output in self.get_outputs()} if self.inplace else {}


def cuda_archs(asked, capabilities):
    """The architectures to compile for, as CMake has them; None: all, the list in CMakeLists.txt.

    asked: ZIGZAG_CUDA_ARCHS. capabilities: of the GPUs of this machine, such as ["9.0"]; older ones than 8.0 have no kernels.
    """
    if asked:
        return None if asked == "all" else asked
    served = {capability for capability in capabilities if int(capability.split(".")[0]) >= 8}
    specific = {"9.0": "90a", "10.0": "100a"}  # kernels of the newest instructions are compiled for these only
    return ";".join(sorted(specific.get(each, each.replace(".", "")) for each in served)) or None


def _compute_capabilities():
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^\d+\.\d+$", found.stdout, re.MULTILINE) if found.returncode == 0 else []


def _cmake():
    return [sys.executable, "-m", "cmake"] if importlib.util.find_spec("cmake") else ["cmake"]


def _ninja():
    """The ninja of this Python's environment, which need not be on the PATH, or the one on the PATH."""
    if importlib.util.find_spec("ninja"):
        import ninja

        return shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
    return shutil.which("ninja")


setup(
    ext_modules=[Extension("zigzag_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "egg_info": Metadata},
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
)
