"""Programs and commands in documents: which there are, and running them as they stand, in order, in one folder per document.

A comment on the line before a block says what is special about it:
    <!-- not run: REASON -->   it is not run
    <!-- long -->              it is run with --long only, as in `make test-long`
    <!-- output -->            (text) it is what the block before it prints
    <!-- FILE -->              it is that file of the repository, and run
    <!-- serves -->            a command that serves at port 8000 until Ctrl-C, which comes at the end of the page; for tests the
                               page has another port
"""

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_BLOCK = re.compile(r"^(?:<!-- (?P<mark>[^\n]+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_DECIMAL = re.compile(r"\d+\.\d+")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its first line, from 1
    language: str
    text: str
    mark: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def runs(self, long: bool) -> bool:
        left_out = self.mark.startswith("not run: ") or (self.mark == "long" and not long)
        return self.language in ("python", "bash") and not left_out


def blocks(page: Path) -> list[Block]:
    source = page.read_text()
    return [
        Block(page, source.count("\n", 0, found.start("text")) + 1, found["language"], found["text"], found["mark"] or "")
        for found in _BLOCK.finditer(source)
    ]


def quoted_messages(page: Path) -> list[str]:
    """The texts in the first cells of a page's tables."""
    return re.findall(r"^\| `(.+?)` \|", page.read_text(), re.MULTILINE)


def prepare(folder: Path, model: Path) -> dict[str, str]:
    """Makes `folder` a place where the model's name is a folder, the examples are there, and `zigzag` is this source's command.

    Returns the environment of commands.
    """
    (folder / MODEL).parent.mkdir()
    (folder / MODEL).symlink_to(model)
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "bin").mkdir()
    for name, command in {"python": "", "zigzag": "-m zigzag_ext"}.items():
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {command} "$@"\n')
        program.chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    return {"PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "NO_COLOR": "1"}


def run(page: Path, folder: Path, environment: dict[str, str], long: bool) -> int:
    """Runs the blocks of a page in the present folder, the programs in one namespace; returns how many. Outputs are compared."""
    namespace, printed, count = {"__name__": "__main__"}, "", 0
    with contextlib.ExitStack() as servers:
        for block in _on_a_free_port(blocks(page)):
            if block.mark == "output":
                assert same_output(printed, block.text), f"{block.place} shows\n{block.text}\nprinted was\n{printed}"
            if not block.runs(long):
                continue
            count += 1
            if block.mark == "serves":
                servers.enter_context(_serving(block, folder, environment))
            else:
                printed = _python(block, namespace) if block.language == "python" else _bash(block, folder, environment)
    return count


def same_output(printed: str, shown: str, tolerance: float = 0.02) -> bool:
    """Whether two texts are equal, numbers with a decimal point nearly: kernels round as the processor has it."""
    lines = lambda text: [line.rstrip() for line in text.strip().splitlines()]  # noqa: E731
    printed, shown = lines(printed), lines(shown)
    if [_DECIMAL.sub("#", line) for line in printed] != [_DECIMAL.sub("#", line) for line in shown]:
        return False
    numbers = [[float(number) for line in text for number in _DECIMAL.findall(line)] for text in (printed, shown)]
    return all(abs(a - b) <= tolerance * max(1.0, abs(b)) for a, b in zip(*numbers, strict=True))


def _on_a_free_port(shown: list[Block]) -> list[Block]:
    if not any(block.mark == "serves" for block in shown):
        return shown
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return [replace(block, text=block.text.replace("8000", port)) for block in shown]


@contextlib.contextmanager
def _serving(block: Block, folder: Path, environment: dict[str, str]) -> Iterator[None]:
    """A server from when it says that it serves; a Ctrl-C then ends it well."""
    said = folder / "said.txt"
    with said.open("w") as file:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {block.text}"], cwd=folder, env=os.environ | environment, stderr=file, start_new_session=True
        )
    try:
        while "\nserving " not in said.read_text():
            assert process.poll() is None, f"{block.place}: exit code {process.returncode}\n{said.read_text()[-2000:]}"
            time.sleep(0.1)
        yield
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 0, f"{block.place}: exit code {process.returncode}\n{said.read_text()[-2000:]}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _python(block: Block, namespace: dict) -> str:
    printed, stdin = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO()  # a program that asks is told nothing
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(block.text, block.place, "exec"), namespace)
    finally:
        sys.stdin = stdin
    return printed.getvalue()


def _bash(block: Block, folder: Path, environment: dict[str, str]) -> str:
    command = ["bash", "-euo", "pipefail", "-c", block.text]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{block.place}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout
