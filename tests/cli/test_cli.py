"""The `zigzag` command as a user runs it: help, results, and one line for every expected failure."""

import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

import zigzag_ext as zz
from zigzag_ext.cache.compression import METHODS
from zigzag_ext.cli import demo
from zigzag_ext.cli.main import app

LAYERS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 2, 64, 60


def zigzag(*arguments, stdin=None):
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, env={"COLUMNS": "200", "NO_COLOR": "1"})


def failure(*arguments, stdin=None) -> str:
    """The one line that a failing command prints."""
    result = zigzag(*arguments, stdin=stdin)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.output
    return lines[0]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny random Llama with a tokenizer of words w0, w1, ... saved as a user's model folder."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM, vocab_size=VOCABULARY, eos_token_id=None, bos_token_id=None, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


@pytest.fixture
def scores(tmp_path):
    path = tmp_path / "scores.tsv"
    np.savetxt(path, [[0.9, 0.7], [0.1, 0.2], [0.8, 0.1], [0.0, 0.3]], delimiter="\t")
    return path


@pytest.fixture
def plan_file(tmp_path):
    path = tmp_path / "given.json"
    zz.Plan(["retrieval", "streaming", "streaming", "retrieval"], sink=2, window=8).save(path)
    return path


def test_help_names_every_command_and_every_option_has_a_help_text():
    assert zigzag().output.count("Usage:") == 1
    text = zigzag("--help").output
    for command in app.registered_commands:
        name = command.name or command.callback.__name__
        assert name in text
        one = zigzag(name, "--help")
        assert one.exit_code == 0 and command.callback.__doc__.split("\n")[0].split(":")[0][:30] in one.output


def test_solve_writes_the_plan_and_prints_what_it_saves(scores, tmp_path):
    out = tmp_path / "plan.json"
    result = zigzag("solve", scores, "-o", out, "-r", 0.5, "--sink", 4, "--window", 12, "--context", 1024, "--head-dim", 64)
    assert result.exit_code == 0, result.output
    plan = zz.Plan.load(out)
    assert plan.kinds == ("retrieval", "streaming", "retrieval", "streaming") and (plan.sink, plan.window) == (4, 12)
    assert f"{(2 * 1024 + 2 * 16) / (4 * 1024):.0%} of" in result.output
    assert str(out) in result.output and "retrieval" in result.output


@pytest.mark.parametrize("config_only", [False, True])
def test_solve_reckons_with_the_model(scores, tmp_path, model_folder, config_only):
    out, source = tmp_path / "plan.json", model_folder / "config.json" if config_only else model_folder
    result = zigzag("solve", scores, "-o", out, "--model", source, "--context", 1000, "--sink", 4, "--window", 12)
    assert result.exit_code == 0, result.output
    assert f"({2 * (1000 + 16) * KV_HEADS * HEAD_DIM * 2 * 4:,} bytes)" in result.output and "in 32 bits" in result.output
    origin = {"model": str(model_folder), "layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "query_heads": 4}
    assert zz.Plan.load(out).origin == origin
    np.savetxt(scores, np.ones((LAYERS, 4)))
    words = f"scores are for 4 layers x 4 KV heads; the model has 4 layers x 2 KV heads of head_dim 64 ({model_folder})"
    assert words in failure("solve", scores, "-o", out, "--model", source)
    assert "nowhere" in failure("solve", scores, "-o", out, "--model", tmp_path / "nowhere")


def test_solve_chooses_among_the_full_layers_of_a_hybrid_model(tmp_path):
    sizes = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}
    Gemma3TextConfig(sliding_window=16, sliding_window_pattern=2, dtype="float16", **sizes).save_pretrained(tmp_path / "model")
    np.save(tmp_path / "scores.npy", np.array([[0.9, 0.8], [0.1, 0.2], [0.5, 0.4]]))
    out, source = tmp_path / "plan.json", tmp_path / "model"
    result = zigzag(
        "solve", tmp_path / "scores.npy", "-o", out, "--model", source, "--context", 1000, "--sink", 4, "--window", 12
    )
    assert "6: 3 native windows of 16, 3 full: 2 retrieve, 1 stream" in result.output
    token = 2 * 2 * 64 * 2
    kept, full = (2 * 1000 + 16 + 3 * 16) * token, (3 * 1000 + 3 * 16) * token
    assert f"({kept:,} bytes), {kept / full:.0%} of" in result.output
    plan = zz.Plan.load(out)
    assert plan.native_windows == (16, None) * 3 and plan.retrieval_layers == (1, 5)


def test_solve_passes_every_option_on(scores, tmp_path):
    costs, out = tmp_path / "costs.json", tmp_path / "plan.json"
    costs.write_text('{"context": [10, 20], "retrieval": [1, 2], "streaming": [0.5, 0.5]}')
    cases = [
        (["--retrieval-layers", 3, "--objective", "transport", "--threshold", 0.5], {"retrieval_layers": 3}),
        (["--kv-bytes", 6e6, "--context", 2000, "--head-dim", 64, "--objective", "even"], {"kv_bytes": 6e6}),
        (["--ms", 4, "--costs", costs, "--context", 15, "--objective", "cvar", "--top-heads", 1], {"ms": 4}),
        (
            ["-r", 0.5, "--stages", 2, "--max-streaming-run", 1, "--sparsity", 0.25, "--objective", "count"],
            {"retrieval_ratio": 0.5},
        ),
        (["--stages", "1,3", "--force-retrieval", "1", "--force-streaming", "2,3"], {"retrieval_ratio": 0.5}),
    ]
    own = {
        "threshold": {"threshold": 0.5}, "top_heads": {"top_heads": 1}, "sparsity": {"sparsity": 0.25},
        "stages": {"stages": [2, 2], "max_streaming_run": 1},
        "forced": {"stages": [1, 3], "force_retrieval": [1], "force_streaming": [2, 3]},
    }  # fmt: skip
    expected = [own["threshold"], {}, own["top_heads"], own["sparsity"] | own["stages"], own["forced"]]
    for (options, budget), recorded in zip(cases, expected, strict=True):
        result = zigzag("solve", scores, "-o", out, *options)
        assert result.exit_code == 0, result.output
        provenance = zz.Plan.load(out).provenance
        assert provenance["budget"] == budget
        assert provenance.get("constraints", {}) | provenance.get("options", {}) == recorded


def test_solve_help_lists_the_objectives():
    text = " ".join(zigzag("solve", "--help").output.replace("│", " ").split())
    for name, description in zz.objectives().items():
        assert f"{name}: {description}" in text


@pytest.mark.parametrize(
    "options,message",
    [
        (["--retrieval-ratio", 1.5], "1.5"),
        (["--objective", "best"], "best"),
        (["--sink", -1], "-1"),
        (["--window", 0], "0"),
        (["--context", 0], "context"),
        (["--kv-bytes", 1], "the cheapest possible kv_bytes"),
        (["--ms", 1], "cost table"),
        (["--retrieval-layers", 1, "--force-retrieval", "0,1"], "possible retrieval_layers: 2 to 4"),
        (["--force-streaming", "first"], "--force-streaming must be integers"),
        (["--stages", 3], "stages = 3"),
        (["--objective", "cvar", "--top-heads", 9], "top_heads"),
        (["--head-dim", 0], "head"),
    ],
)
def test_solve_refuses_and_writes_nothing(scores, tmp_path, options, message):
    out = tmp_path / "plan.json"
    assert message in failure("solve", scores, "-o", out, *options)
    assert not out.exists()


def test_version():
    assert zigzag("--version").output == f"zigzag_ext {zz.__version__}\n"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_the_script_without_its_packages_says_how_to_get_them(missing):
    code = f"import sys; sys.modules['{missing}'] = None; from zigzag_ext.__main__ import main; main()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == f"error: the zigzag command needs {missing}: pip install 'zigzag_ext[cli]'\n"


def test_missing_files_are_named(scores, tmp_path, plan_file, model_folder):
    assert "nowhere" in failure("solve", tmp_path / "nowhere")
    assert "nowhere" in failure("solve", scores, "-o", tmp_path / "nowhere" / "plan.json")
    assert "nowhere.json" in failure("info", tmp_path / "nowhere.json")
    assert "nowhere.json" in failure("generate", model_folder, "--plan", tmp_path / "nowhere.json", "-p", "w1")
    assert "nowhere" in failure("generate", tmp_path / "nowhere", "-p", "w1")
    assert "neither config.json nor a .gguf" in failure("generate", tmp_path, "-p", "w1")


def generated(result) -> tuple[str, float]:
    """The text on standard output and the KV memory in MiB of the summary on standard error."""
    assert result.exit_code == 0, result.output
    return result.stdout.strip(), float(re.search(r"KV cache ([\d.]+) MiB", result.stderr).group(1))


def test_generate_without_a_plan_is_stock_generation(model_folder):
    prompt = " ".join(f"w{(7 * i) % VOCABULARY}" for i in range(40))
    text, mebibytes = generated(zigzag("generate", model_folder, "-p", prompt, "-n", 12, "--device", "cpu"))
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="sdpa")
    ids = torch.tensor([[(7 * i) % VOCABULARY for i in range(40)]])
    everything = torch.ones_like(ids)  # w0 is also the padding token
    expected = model.generate(ids, attention_mask=everything, max_new_tokens=12, do_sample=False)[0, 40:].tolist()
    assert text.split() == [f"w{i}" for i in expected]
    assert len(set(expected)) > 2, "the model repeats itself: the comparison would prove little"
    assert mebibytes == pytest.approx(LAYERS * 52 * KV_HEADS * HEAD_DIM * 2 * 4 / 2**20, abs=0.05)


@pytest.mark.parametrize("options", [[], ["--chunk", 7]])
def test_generate_with_a_plan(model_folder, plan_file, options):
    prompt = " ".join(f"w{(7 * i) % VOCABULARY}" for i in range(600))
    run = zigzag("generate", model_folder, "--plan", plan_file, "-n", 8, "--device", "cpu", *options, stdin=prompt)
    text, mebibytes = generated(run)
    assert len(text.split()) == 8
    assert mebibytes == pytest.approx(2 * (608 + 10) * KV_HEADS * HEAD_DIM * 2 * 4 / 2**20, abs=0.05)
    full, _ = generated(zigzag("generate", model_folder, "-n", 8, "--device", "cpu", stdin=prompt))
    assert text != full


def test_generate_with_quantised_keys(model_folder):
    prompt = " ".join(f"w{(7 * i) % VOCABULARY}" for i in range(60))
    options = ["generate", model_folder, "-n", 4, "--device", "cpu", "-p", prompt, "--key-smoothing"]
    run = zigzag(*options, "--kv-format", "int8/int4")
    assert len(generated(run)[0].split()) == 4 and "int8/int4" in run.stderr and "key_smoothing" in run.stderr
    assert "key_smoothing needs quantised keys" in failure(*options)


def test_generate_speculates(model_folder, plan_file):
    """The same text, and a report of what was drafted."""
    options = ["generate", model_folder, "--plan", plan_file, "-n", 24, "--device", "cpu", "-p", " ".join(["w1 w2 w3 w4"] * 20)]
    plain, drafted = zigzag(*options), zigzag(*options, "--speculate", "streaming")
    assert generated(drafted)[0] == generated(plain)[0]
    assert "draft=streaming: 24 tokens" in drafted.stderr and "draft=" not in plain.stderr
    assert "got 'oracle'" in failure(*options, "--speculate", "oracle")


def test_generate_with_a_compressed_prompt(model_folder, plan_file):
    """As `enable` with the same method, and the report tells what stayed."""
    prompt = " ".join(f"w{(7 * i) % VOCABULARY}" for i in range(600))
    run = ["generate", model_folder, "--plan", plan_file, "-n", 8, "--device", "cpu", "-p", prompt]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    ids = torch.tensor([[(7 * i) % VOCABULARY for i in range(600)]])
    for options, method in [
        (["--compress", 0.12], zz.PromptWindows(budget=0.12)),
        (["--compress", 80, "--compress-window", 4, "--compress-observe", 16], zz.PromptWindows(budget=80, window=4, observe=16)),
        (["--compress", 90, "--compress-method", "chunkkv", "--compress-window", 6], METHODS["chunkkv"](budget=90, chunk=6)),
    ]:
        with zz.zigzag(model, zz.Plan.load(plan_file), compress=method):
            answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0, 600:]
        result = zigzag(*run, *options)
        assert generated(result)[0].split() == [f"w{i}" for i in answer] and "of 607 tokens kept" in result.stderr
    assert "need --compress" in failure(*run, "--compress-observe", 16)
    assert "windows, snapkv, pyramidkv" in failure(*run, "--compress", 0.5, "--compress-method", "h2o")
    assert "recent has none" in failure(*run, "--compress", 0.5, "--compress-method", "recent", "--compress-window", 4)
    assert "got 'much'" in failure(*run, "--compress", "much")
    assert "share of the prompt" in failure(*run, "--compress", 1.2)


def test_generate_refuses_by_one_line(model_folder, tmp_path):
    wrong = tmp_path / "wrong.json"
    zz.Plan(["retrieval"] * 3, sink=0, window=4).save(wrong)
    assert "3 layers" in failure("generate", model_folder, "--plan", wrong, "-p", "w1", "--device", "cpu")
    assert "empty" in failure("generate", model_folder, "-p", "", "--device", "cpu")
    assert "quantum" in failure("generate", model_folder, "-p", "w1", "--device", "quantum")
    for dtype in ("int3", "float64", "int8"):
        assert dtype in failure("generate", model_folder, "-p", "w1", "--device", "cpu", "--dtype", dtype)


@pytest.mark.parametrize("kept", [0.5, 0.001])
def test_generate_names_a_truncated_file(model_folder, tmp_path, kept):
    folder = shutil.copytree(model_folder, tmp_path / "truncated")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: int(len(weights) * kept)])
    assert "incomplete" in failure("generate", folder, "-p", "w1", "--device", "cpu")


def test_info_explains_launches_of_known_gpus():
    text = zigzag("info", "--explain", "32x4x128", "--kv-len", "32K").output
    row = next(line.split() for line in text.splitlines() if line.startswith("H200"))
    assert row[1] == "132" and "clusters" in row and "67.1" in row  # 2 x 32768 x 4 heads x 256 bytes
    assert "memory" in next(line for line in text.splitlines() if line.startswith("A100"))
    assert "--explain" in failure("info", "--explain", "32/4/128")
    assert "--kv-len" in failure("info", "--explain", "32x4x128", "--kv-len", "lots")
    assert "head_dim" in failure("info", "--explain", "32x4x100")


def test_info_lists_what_is_supported(plan_file):
    text = zigzag("info").output
    assert all(str(head_dim) in text for head_dim in zz.ops.HEAD_DIMS)
    assert zz.build_info()["version"] in text and "bfloat16" in text
    assert "window" in zigzag("info", plan_file).output and "8 tokens" in zigzag("info", plan_file).output


def test_demo_without_its_model_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    assert demo.FETCH_COMMAND in failure("demo")
    assert not any(tmp_path.rglob("*"))
