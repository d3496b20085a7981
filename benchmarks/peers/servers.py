"""Servers with OpenAI's API in processes of their own: this package's, and that of transformers with continuous batching."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import zigzag_ext as zz

from ..cells.http_clients import WORDS, clients
from ..cells.serve_scenarios import Job
from .generate_batch import check_batching, sizes_of

_SECONDS = 600  # until a server answers
COMMANDS = {
    "zigzag_server": ["-m", "zigzag_ext", "serve"],
    "transformers_server": ["-m", "transformers.cli.transformers", "serve", "--continuous-batching"],
}


def measure(impl: str, model, plan: zz.Plan | None, job: Job) -> Iterator[tuple[str, dict]]:
    """The scenario "server": that model in a folder with a tokenizer of words, served, and its clients."""
    if impl == "transformers_server":
        check_batching()
    with tempfile.TemporaryDirectory() as folder:
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
        model.save_pretrained(folder)
        options = ["--device", model.device.type]
        if plan is not None:
            plan.save(Path(folder) / "plan.json")
            options += ["--plan", f"{folder}/plan.json", "--max-len", str(job.prompt + job.new), "--max-rows", str(job.rows)]
        elif model.device.type == "cpu":
            sizes = sizes_of(model, job)
            options += ["--cb-num-blocks", str(sizes["num_blocks"]), "--cb-max-batch-tokens", str(sizes["max_batch_tokens"])]
        with _served(impl, folder, options) as port:
            yield clients(port, folder, job)


@contextmanager
def _served(impl: str, folder: str, options: list[str]) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(folder) / "log.txt"
    with log.open("w") as file:
        command = [sys.executable, *COMMANDS[impl], folder, "--port", str(port), *options]
        process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        start = time.monotonic()
        while not _answers(port):
            if process.poll() is not None or time.monotonic() - start > _SECONDS:
                raise RuntimeError(f"{impl} does not serve: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
