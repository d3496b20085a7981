"""What a config alone tells: `zigzag info MODEL`, and the table of families in docs/models.md."""

import re
from pathlib import Path

import pytest
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen3VLConfig,
)
from typer.testing import CliRunner

from benchmarks.report import families
from zigzag_ext.cli.main import app
from zigzag_ext.hf.served import auto_class, kv_table, report, served

TABLE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
ROW = re.compile(r"^\| ([\w.-]+) \| (yes|text|no) \| (.*?) ?\| (.*?) ?\|$", re.MULTILINE)
ROWS = {cells[0]: cells for cells in ROW.findall(TABLE.read_text())}
# Others take seconds each to import.
FEW = ["cohere2", "deepseek_v3", "gemma2", "gemma3", "gpt_oss", "jamba", "llama", "mistral", "qwen3_next", "qwen3_vl"]
GEMMA = Gemma3TextConfig(num_hidden_layers=12, head_dim=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=512)


def pytest_generate_tests(metafunc):
    if "listed" in metafunc.fixturenames:
        metafunc.parametrize("listed", families.families() if metafunc.config.getoption("--long") else FEW)


@pytest.mark.skipif(not transformers.__version__.startswith("5.17."), reason="the table is of transformers 5.17")
def test_the_table_is_up_to_date(listed):
    assert sorted(ROWS) == families.families()
    assert list(ROWS[listed]) == families.line(listed)


def test_the_table_says_how_many_are_served():
    count = sum(row[1] != "no" for row in ROWS.values())
    assert f"{count} of {len(ROWS)} families are served." in TABLE.read_text()


def test_kv_bytes_of_a_config():
    token = 2 * 2 * 64 * 2  # keys and values of two heads in 16 bits
    as_it_is, half = kv_table(GEMMA)["32K"]
    assert as_it_is == (10 * 512 + 2 * 32768) * token
    assert half == (10 * 512 + 32768 + 320) * token
    assert (
        kv_table(LlamaConfig(num_hidden_layers=2, hidden_size=256, num_attention_heads=4))["1M"][0] == 2 * (1 << 20) * 2 * token
    )


def test_info_of_a_model_from_its_config(tmp_path):
    GEMMA.save_pretrained(tmp_path)
    shown = CliRunner().invoke(app, ["info", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "10 native windows of 512, 2 full: 2 retrieve, 0 stream" in shown.output
    assert re.search(r"a plan may choose +5 11", shown.output) and re.search(r"served +yes", shown.output)
    assert "KV bytes at 1M" in shown.output


def test_info_of_a_model_that_is_refused():
    rows = dict(report(LlamaConfig(head_dim=48)))
    assert rows["served"] == "no: its head_dim is 48; supported: 64, 80, 96, 128, 192, 256, 512" and "KV bytes at 32K" not in rows
    assert served(LlamaConfig(num_hidden_layers=2)).refusal is None


def test_info_of_image_text_models():
    assert dict(report(Gemma3Config()))["served"] == "text; prompts with images raise: the tokens of one image see each other"
    assert auto_class(Qwen3VLConfig()) is AutoModelForImageTextToText and auto_class(LlamaConfig()) is AutoModelForCausalLM
    sizes = Qwen3VLConfig(text_config={"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 64})
    assert kv_table(sizes)["32K"][0] == 2 * 32768 * 2 * 2 * 64 * 2
