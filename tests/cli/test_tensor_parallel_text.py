"""`zigzag generate --tp`: one command in several processes."""

import os
import subprocess
import sys

import pytest
import torch
from test_cli import VOCABULARY, failure, model_folder, plan_file, zigzag  # noqa: F401  fixtures
from transformers import AutoConfig

from zigzag_ext.study import loading

WORDS = " ".join(f"w{(7 * i) % VOCABULARY}" for i in range(1, 80))
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error of its own."""
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.fixture
def two_processes(monkeypatch):
    """What torchrun tells a process."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("options", [["--chunk", "32"], ["--kv-format", "int8", "--temperature", "0.5", "--speculate", "auto"]])
@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_two_processes_write_the_text_of_one_once(model_folder, plan_file, kind, options):  # noqa: F811
    text = ["generate", str(model_folder), "--plan", str(plan_file), "-p", WORDS, "-n", "6", *options]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "zigzag_ext"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if kind == "cpu" else {}
    done = subprocess.run([*torchrun, *text, "--tp"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 6 and done.stderr.count("KV cache") == 1
    if kind == "cpu" and "--temperature" not in options:
        assert done.stdout.split() == zigzag(*text, "--device", "cpu").stdout.split()


@pytest.mark.parametrize("options, message", [
    (["-p", "w1", "--device", "cpu"], "leave the device auto"),
    (["-p", "w1", "--device-map", "auto"], "leave the device auto and the device map out"),
    (["-p", "w1", "--save-cache", "x"], "leave out --save-cache"),
    ([], "--tp needs --prompt"),
])  # fmt: skip
def test_what_processes_cannot_share_is_refused_before_loading(
    model_folder, two_processes, no_model, options, message, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in failure("generate", model_folder, "--tp", *options)


def test_one_process_is_told_how_to_start_several(model_folder, no_model, monkeypatch):  # noqa: F811
    monkeypatch.delenv("RANK", raising=False)
    assert "torchrun --nproc-per-node 2 -m zigzag_ext" in failure("generate", model_folder, "-p", "w1", "--tp")


def test_models_that_cannot_be_shared_out_are_refused(model_folder, two_processes, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="3 processes cannot share out 2 KV heads"):
        loading.check_tensor_parallel(str(model_folder))
    AutoConfig.for_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tensor parallel plan for gpt2"):
        loading.check_tensor_parallel(str(tmp_path))
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ValueError, match=".gguf file, which cannot be shared out"):
        loading.check_tensor_parallel(str(tmp_path / "m.gguf"))
