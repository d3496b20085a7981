"""CI checks: `build` (CUDA is compiled wherever nvcc is), `skips FILE` (junit XML: skipped only for want of what CI cannot have).

`names` prints the packages that the tests need, without versions. `release` prints the version, if its commit may be tagged.
"""

import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from importlib.metadata import requires
from pathlib import Path

# The score files are published data that is not part of the repository. vLLM is 3 GB and has tests of its own: make test-vllm.
ALLOWED_SKIPS = ("needs a CUDA GPU", "needs two CUDA GPUs", "needs vLLM", "published score files are not at")


def check_build() -> str | None:
    import zigzag_ext

    info = zigzag_ext.build_info()
    print(info)
    if shutil.which("nvcc") and not info["cuda"]:
        return "nvcc is on the PATH, but the build has no CUDA kernels"
    return None


def check_skips(path: str) -> str | None:
    """Every skipped test must need what CI cannot have: whatever a CPU can run has to run here."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    skips = [(case, skip.get("message", "")) for case in cases for skip in case.iter("skipped")]
    wrong = [
        f"{case.get('classname')}::{case.get('name')}: {reason}" for case, reason in skips if not reason.startswith(ALLOWED_SKIPS)
    ]
    print(f"{len(cases)} tests, {len(skips)} skipped for want of a GPU, of vLLM or of data, {len(wrong)} for another reason")
    if wrong:
        return "skipped although a CPU could run them:\n" + "\n".join(wrong)
    return None if cases else "no test ran"


def print_names() -> None:
    extras = re.compile(r"""extra == ["'](hf|cli|demo|serve|plot|test)["']""")
    needed = [line for line in requires("zigzag_ext") if "extra" not in line or extras.search(line)]
    print(*sorted({re.match(r"[\w.-]+", line)[0] for line in needed} - {"zigzag_ext", "zigzag-ext"}))


def check_release(root: str = ".") -> str | None:
    """The changelog's topmost section is dated and of the version, and all is committed."""
    version = re.search(r'^version = "(.+?)"', Path(root, "pyproject.toml").read_text(), re.MULTILINE).group(1)
    section = re.search(r"^## (.*)", Path(root, "CHANGELOG.md").read_text(), re.MULTILINE).group(1)
    if not re.fullmatch(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d", section):
        return f"the topmost section of CHANGELOG.md must be '[{version}] - ' and the date, it is '{section}'"
    if changed := subprocess.run(["git", "status", "--short"], cwd=root, capture_output=True, text=True, check=True).stdout:
        return f"not committed:\n{changed}"
    print(version)
    return None


if __name__ == "__main__":
    checks = {"build": check_build, "skips": check_skips, "names": print_names, "release": check_release}
    sys.exit(checks[sys.argv[1]](*sys.argv[2:]))
