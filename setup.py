"""Builds the package by CMake, which alone knows the sources, the flags and whether there is an nvcc.

Environment: ZIGZAG_CUDA=auto|on|off (default auto: CUDA kernels where nvcc is found), ZIGZAG_CUDA_ARCHS="80;90a" (default: the
list in CMakeLists.txt), MAX_JOBS (parallel compilations, default: the number of cores).
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


class CMakeBuild(build_ext):
    def run(self):
        target = ROOT / "zigzag_ext" if self.inplace else Path(self.build_lib).absolute() / "zigzag_ext"
        build = Path(os.environ.get("ZIGZAG_BUILD_DIR", ROOT / "build" / f"python-{sys.version_info[0]}.{sys.version_info[1]}"))
        options = [f"-D{name}={os.environ[name]}" for name in ("ZIGZAG_CUDA", "ZIGZAG_CUDA_ARCHS") if name in os.environ]
        options += [f"-DPython_EXECUTABLE={sys.executable}", f"-DZIGZAG_VERSION={self.distribution.get_version()}"]
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        cmake = [sys.executable, "-m", "cmake"] if _has_module("cmake") else ["cmake"]
        run = lambda *command: subprocess.run([*cmake, *command], check=True)  # noqa: E731
        run("-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DZIGZAG_BUILD_PYTHON=ON", *options)
        run("--build", str(build), "--parallel", jobs, "--target", "_ops", "_C")
        run("--install", str(build), "--prefix", str(target))

    def get_outputs(self):
        return [str(path) for path in (Path(self.build_lib) / "zigzag_ext").glob("*.so")]


def _has_module(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


setup(ext_modules=[Extension("zigzag_ext._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
