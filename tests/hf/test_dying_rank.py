"""A process of tensor parallelism that is killed ends the others, which say why."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_models import new_model

WORKER = Path(__file__).with_name("dying_rank.py")
SECONDS = 60  # in which all must have ended
KINDS = [
    ("cpu", "eager"),
    *(
        pytest.param("cuda", steps, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"))
        for steps in ("eager", "compiled")
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    new_model("llama", num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4, vocab_size=200).save_pretrained(folder)
    return str(folder)


def start(kind: str, command: list[str], **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if kind == "cpu" else {}  # transformers would give each process a GPU
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-W", "ignore", *command], env=environment, start_new_session=True, **pipes)


def kill_mid_step(process: int) -> None:
    time.sleep(0.5)  # each step takes milliseconds
    os.kill(process, signal.SIGKILL)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_other_process_ends_and_says_why(folder):
    """Without torchrun, which would end it. A GPU's own collectives wait for the lost process until somebody does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start("cpu", [str(WORKER), "cpu", "eager", folder], RANK=r, LOCAL_RANK=r, **common) for r in ("0", "1")]
    try:
        for rank in ranks:
            assert rank.stdout.readline().split()[1] == str(rank.pid)
        kill_mid_step(ranks[1].pid)
        _, said = ranks[0].communicate(timeout=SECONDS)
        assert ranks[0].returncode > 0
        assert "another of the 2 processes that share the model out has ended or does not answer" in said
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.parametrize(("kind", "steps"), KINDS)
def test_torchrun_ends_the_other_process_and_says_why(kind, steps, folder):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), kind, steps, folder]
    torchrun = start(kind, launch)
    processes: dict[str, int] = {}
    try:
        while len(processes) < 2:
            line = torchrun.stdout.readline()
            assert line, torchrun.stderr.read()
            rank, process = line.split()
            processes[rank] = int(process)
        kill_mid_step(processes["1"])
        _, said = torchrun.communicate(timeout=SECONDS)
        assert torchrun.returncode > 0 and "SIGKILL" in said
        assert not any(map(is_alive, processes.values()))
    finally:
        for process in (*processes.values(), torchrun.pid):
            if is_alive(process):
                os.kill(process, signal.SIGKILL)
        torchrun.wait()
