"""Heads shared out to two processes by tensor parallelism: what they compute is what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensor_parallel
import torch

RANKS = 2
KINDS = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two CUDA GPUs"))]


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory) -> Path:
    """The folder that both processes have written to, what went wrong in each case."""
    kind, folder = request.param, tmp_path_factory.mktemp("ranks")
    worker = [str(Path(__file__).with_name("tensor_parallel.py")), kind, str(folder)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONFAULTHANDLER": "1"}  # says where one crashed
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if kind == "cpu" else {}  # transformers would give each process a GPU
    done = subprocess.run(torchrun + worker, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("case", tensor_parallel.CHECKS)
def test_two_processes_compute_what_one_does(written, case):
    wrong = {rank: text for rank in range(RANKS) if (text := (written / f"{case}.{rank}").read_text())}
    assert not wrong, "\n".join(f"rank {rank}: {text}" for rank, text in wrong.items())
