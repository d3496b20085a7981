"""Programs that could end their process, in a process of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

FOLDERS = [Path(__file__).parents[2], Path(__file__).parent, Path(__file__).parents[1] / "hf"]


def run(program: str, preamble: str = "", timeout: float = 300) -> str:
    """The output of a program, which must end well; its last lines say how far it came."""
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", preamble + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, FOLDERS))},
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
