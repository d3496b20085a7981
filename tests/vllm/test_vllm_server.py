"""`vllm serve MODEL $(zigzag vllm-args plan.json)`, in processes of its own, over HTTP."""

import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from dense_oracle import dense_oracle, logits_of
from installed import environment, needs_vllm
from tiny_models import VOCAB, new_model

import zigzag_ext as zz

pytestmark = needs_vllm

PLAN, NEW = zz.Plan(["retrieval", "streaming"] * 2, sink=20, window=70), 16
PROMPTS = [torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in (30, 333)]


def post(port: int, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@contextmanager
def served(folder, words: str, **variables):
    """The port of a server, once it answers; the shell splits `words` as it does those of `$(...)`."""
    port, log = free_port(), folder.parent / "server.log"
    options = f"--dtype float32 --enforce-eager --block-size 32 --max-model-len 1024 --skip-tokenizer-init --port {port}"
    command = f"exec {sys.executable} -m vllm.entrypoints.cli.main serve {shlex.quote(str(folder))} $ARGS {options}"
    with log.open("w") as file:
        program = subprocess.Popen(
            ["bash", "-c", command], env=environment(folder.parent / "site") | {"ARGS": words}, stdout=file, stderr=file
        )
    try:
        for _ in range(600):
            assert program.poll() is None, log.read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield port
    finally:
        program.terminate()
        program.wait(60)


def printed(plan_file, *options) -> str:
    command = [sys.executable, "-m", "zigzag_ext", "vllm-args", str(plan_file), *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("stock", [False, True], ids=["plugin", "stock"])
def test_a_server_runs_the_printed_arguments(tmp_path, stock):
    """Without the plugin the tokens are those of windows alone."""
    folder, model = tmp_path / "model", new_model("llama")
    model.save_pretrained(folder)
    PLAN.save(tmp_path / "plan.json")
    with dense_oracle(model, PLAN.kinds, 0 if stock else PLAN.sink, PLAN.window):
        expected = [logits_of(model, NEW, input_ids=torch.tensor([prompt]))[0][0].tolist() for prompt in PROMPTS]
    fields = {"model": str(folder), "max_tokens": NEW, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with served(folder, printed(tmp_path / "plan.json", *["--stock"] * stock)) as port:
        answers = [post(port, fields | {"prompt": prompt}) for prompt in PROMPTS]
        assert [answer["choices"][0]["token_ids"] for answer in answers] == expected
        with pytest.raises(urllib.error.HTTPError) as refused:
            post(port, fields | {"prompt": PROMPTS[1] * 4})
        assert refused.value.code == 400
