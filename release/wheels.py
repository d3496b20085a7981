"""`make wheels`: the sdist, and from it a wheel for every CPython at hand, without CUDA kernels and, where nvcc is, with them.

A wheel of CPU kernels is of version X+cpu, as torch names its own; one of version X has CUDA kernels too, and runs without a GPU.
The kernels and the torch ops know no Python version (the limited API): they are compiled once per kind of wheel, and each Python
adds its `_C`. So no Python but the one that runs this needs torch or a build tool: it borrows them.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "wheels"
LOCAL_VERSION = {"cpu": "+cpu", "cuda": ""}
ENVIRONMENT = {"cpu": {"ZIGZAG_CUDA": "off"}, "cuda": {"ZIGZAG_CUDA": "on"}}
# What the user's torch brings, and the driver: never copied into a wheel.
NOT_OURS = ("libtorch*", "libc10*", "libcuda.so.*")
_ASK = (
    "import os, sys, sysconfig as c; print(sys.implementation.name, c.get_config_var('Py_GIL_DISABLED') or 0, "
    "*sys.version_info[:2], os.path.exists(c.get_path('include') + '/Python.h'), sys.executable)"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the sdist and the wheels")
    parser.add_argument("--kind", choices=LOCAL_VERSION, action="append", help="default: cpu, and cuda where nvcc is found")
    parser.add_argument("--python", type=Path, action="append", help="an interpreter to build for; default: all at hand")
    given = parser.parse_args()
    kinds = given.kind or ["cpu", *(["cuda"] if shutil.which("nvcc") else [])]
    pythons = interpreters(given.python or at_hand())
    if not pythons:
        sys.exit("no CPython >= 3.10 with its headers was found: name one by --python")
    archive = sdist(given.out)
    for kind in kinds:
        source = unpack(archive, WORK / kind)
        for tag, python in pythons.items():
            start = time.monotonic()
            print(f"{tag}, {kind}: building", flush=True)
            wheel = repair(build(source, kind, borrower(tag, python)), given.out)
            size, seconds = wheel.stat().st_size / 1e6, time.monotonic() - start
            print(f"{tag}, {kind}: {wheel.name}, {size:.1f} MB, {seconds:.0f} s", flush=True)
    return 0


def at_hand() -> list[Path]:
    """Interpreters named python3.N: on the PATH, of pyenv, and where the manylinux images have them."""
    folders = [*map(Path, os.environ["PATH"].split(os.pathsep)), *Path("/opt/python").glob("cp3*-cp3*/bin")]
    folders += sorted(Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv").glob("versions/*/bin"))
    return [path for folder in folders for path in sorted(folder.glob("python3.*")) if re.fullmatch(r"python3\.\d+", path.name)]


def interpreters(paths: list[Path]) -> dict[str, Path]:
    """One interpreter for each version that is built for, by its tag (cp311), in ascending order; the first that is found."""
    found = {}
    for path in paths:
        asked = subprocess.run([path, "-I", "-c", _ASK], capture_output=True, text=True)
        if asked.returncode:  # such as a shim of a version that is not chosen
            continue
        name, free_threaded, major, minor, headers, executable = asked.stdout.strip().split(" ", 5)
        if (name, free_threaded, headers) == ("cpython", "0", "True") and (int(major), int(minor)) >= (3, 10):
            found.setdefault((int(major), int(minor)), Path(executable))
    return {f"cp{major}{minor}": found[major, minor] for major, minor in sorted(found)}


def sdist(out: Path) -> Path:
    """Builds the source archive and returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    made = WORK / "sdist"
    shutil.rmtree(made, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", made, ROOT)
    (archive,) = made.iterdir()
    return Path(shutil.copy2(archive, out))


def unpack(archive: Path, folder: Path) -> Path:
    """The archive's one folder, unpacked anew. Files keep their times: what did not change is not compiled again."""
    shutil.rmtree(folder / "source", ignore_errors=True)
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    return source


def borrower(tag: str, python: Path) -> Path:
    """An environment of this Python in which the build tools and the torch headers of the running one are found."""
    folder = WORK / "python" / tag
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-I", "-m", "venv", "--without-pip", folder)
    interpreter = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([interpreter, "-I", "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    here = subprocess.run([sys.executable, "-I", "-c", ask], check=True, capture_output=True, text=True).stdout
    (Path(packages) / "borrowed.pth").write_text(here)
    return interpreter


def build(source: Path, kind: str, python: Path) -> Path:
    """The wheel as the build backend makes it, for the system at hand."""
    from pyproject_hooks import BuildBackendHookCaller  # comes with the package build

    folder = WORK / kind / "unrepaired"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archs = os.environ.get("ZIGZAG_CUDA_ARCHS") or "all"
    settings = ENVIRONMENT[kind] | {"ZIGZAG_BUILD_DIR": str(WORK / kind / "cmake"), "ZIGZAG_CUDA_ARCHS": archs}
    version = ["egg_info", f"--tag-build={LOCAL_VERSION[kind]}"] if LOCAL_VERSION[kind] else []

    def runner(command, cwd=None, extra_environ=None):
        subprocess.run(command, cwd=cwd, env=os.environ | settings | (extra_environ or {}), check=True)

    backend = BuildBackendHookCaller(source, "setuptools.build_meta", runner=runner, python_executable=str(python))
    return folder / backend.build_wheel(folder, {"--global-option": version})


def repair(wheel: Path, out: Path) -> Path:
    """The wheel with the tag of the oldest glibc that its symbols allow, and nothing of torch's in it."""
    folder = wheel.parent / "repaired"
    excluded = [f"--exclude={name}" for name in NOT_OURS]
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--only-plat", *excluded, "--wheel-dir", folder, wheel)
    (repaired,) = folder.iterdir()
    return Path(shutil.copy2(repaired, out))


def run(*command) -> None:
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    sys.exit(main())
