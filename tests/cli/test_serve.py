"""`zigzag serve` as a user runs it: what it says before a model is loaded, and a process that serves and ends."""

import os
import re
import signal
import subprocess
import sys

import httpx2
import pytest
import torch
from character_model import model, model_folder, one_thread, tokenizer  # noqa: F401
from serving import Raw
from typer.testing import CliRunner

import zigzag_ext as zz
from zigzag_ext.cli.main import app
from zigzag_ext.serve.http import bind


def failure(*arguments) -> str:
    """The one line that `zigzag serve` prints."""
    result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def unloaded(monkeypatch):
    """Fails where a model would be loaded."""
    monkeypatch.setattr("zigzag_ext.cli.serve.load", lambda *args: 1 / 0)


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named_with_what_installs_it(missing, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("zigzag_ext.serve.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert failure(tmp_path) == f"error: the server needs {missing}: pip install 'zigzag_ext[serve]'"


def test_what_is_wrong_is_said_before_the_model_is_loaded(unloaded, model_folder, tmp_path):  # noqa: F811
    zz.Plan(["retrieval"] * 2, sink=0, window=4).save(tmp_path / "wrong.json")
    assert "2 layers" in failure(model_folder, "--plan", tmp_path / "wrong.json")
    assert "nowhere" in failure(model_folder, "--plan", tmp_path / "nowhere.json")
    assert "nowhere" in failure(tmp_path / "nowhere")
    assert "quantum" in failure(model_folder, "--device", "quantum")
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot serve at 127.0.0.1 port {port}" in failure(model_folder, "--port", port)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--memory", -1], "memory must be a share above 0"),
        (["--memory", 1000], "1,000 bytes are left for keys and values"),
        (["--memory", 1.5], "--memory must be a share up to 1 or a whole number of bytes, got 1.5"),
        (["--max-stall-ms", 0], "max_stall_ms must be"),
        (["--max-rows", 5000], "max_rows must be 1 to 1024"),
    ],
)
def test_options_out_of_range_are_named(model_folder, options, words):  # noqa: F811
    assert words in failure(model_folder, "--port", 0, *options)


def started(*arguments, **environment):
    """A process that serves, its port and all that it has said until then."""
    process = subprocess.Popen(
        [sys.executable, "-m", "zigzag_ext", "serve", *map(str, arguments), "--port", "0", "--device", "cpu"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    said = ""
    while found := process.stderr.readline():
        said += found
        if place := re.search(r" at http://127\.0\.0\.1:(\d+)/v1 ", found):
            return process, int(place[1]), said
    raise AssertionError(f"it ended with {process.wait()}: {said}")


def test_a_process_serves_and_a_signal_ends_it(model, model_folder, tokenizer, tmp_path):  # noqa: F811
    plan = zz.Plan(["retrieval", "streaming", "streaming"], sink=4, window=16)
    plan.save(tmp_path / "plan.json")
    options = ["--plan", tmp_path / "plan.json", "--max-len", 2000, "--served-model-name", "tiny"]
    process, port, said = started(model_folder, *options, ZIGZAG_API_KEY="secret")
    try:
        assert repr(plan) in said and "32 requests at once, of up to 2,000 tokens\n" in said
        client = httpx2.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": "Bearer secret"}, timeout=20)
        fields = {"model": "tiny", "prompt": "What?", "temperature": 0, "max_tokens": 9}
        answer = client.post("/v1/completions", json=fields).json()
        with zz.zigzag(model, plan):
            ids = tokenizer("What?", return_tensors="pt")["input_ids"]
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
        assert answer["choices"][0]["text"] == tokenizer.decode(output[0, 5:])
        assert Raw(port, **fields).rest().startswith("HTTP/1.1 401")
        with client.stream("POST", "/v1/completions", json=fields | {"max_tokens": 300, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert "[DONE]" in "".join(lines)
        assert process.wait(20) == 0 and process.stderr.read() == ""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
