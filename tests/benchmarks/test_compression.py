"""The benchmark of compressed prompts: a row per method, runs resume, the report shows all of them."""

import pytest
import torch
from character_model import LAYERS, one_thread  # noqa: F401
from safetensors import safe_open
from transformers import DynamicCache

import zigzag_ext as zz
from benchmarks import compression, kvpress_agreement
from benchmarks.report import compression as report
from zigzag_ext.cache.compression import METHODS
from zigzag_ext.cli import demo
from zigzag_ext.hf.cache_argument import cache_argument
from zigzag_ext.study import evaluate


def test_a_run_a_second_run_and_the_report(model, tokenizer, tmp_path, monkeypatch, capsys):
    plan = zz.Plan(["streaming"] * (LAYERS - 1) + ["retrieval"], sink=4, window=32)
    monkeypatch.setattr(demo, "load", lambda device, dtype: (model, tokenizer))
    monkeypatch.setattr(compression, "plans_of", lambda results, layers: {"half": plan})
    command = ["--tokens", "600", "--prompts", "1", "--budgets", "0.3", "--results", str(tmp_path)]
    command += ["--tasks", "multikey", "second_question"]
    assert compression.main(command) == 0
    path = tmp_path / "compression.csv"
    rows = evaluate.read(path)
    assert len(rows) == 2 * (len(METHODS) + 2) == len({row.cell for row in rows})
    plain = evaluate.multikey(model, tokenizer, plan, lengths=[600], depths=compression.DEPTHS, prompts=1, pooled=True)
    assert rows[0].compress == "" and rows[0].logprob == pytest.approx(plain[0].logprob, abs=1e-5)
    method = zz.PromptWindows(budget=0.3, sink=4, observe=16)
    less = evaluate.multikey(
        model, tokenizer, plan, lengths=[600], depths=compression.DEPTHS, prompts=1, pooled=True, compress=method
    )
    assert rows[1].compress == str(method) and rows[1].logprob == pytest.approx(less[0].logprob, abs=1e-5)
    path.write_text("\n".join(path.read_text().splitlines()[:-3]) + "\n")
    capsys.readouterr()
    assert compression.main(command) == 0
    assert "second_question: 3 rows" in capsys.readouterr().out and evaluate.read(path) == rows

    page = tmp_path / "page.md"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*report.markers(report.NAME)))
    assert report.write(tmp_path, page) == 0
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert text.count("\n| 30% |") == len(METHODS) + 1 and text.count("\n| 100% | nothing dropped |") == 1
    page.write_text("no markers")
    assert report.write(tmp_path, page) == report.write(tmp_path / "none", page) == 1


def test_what_kvpress_is_compared_with(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load", lambda device, dtype: (model, tokenizer))
    monkeypatch.setattr(demo, "model_folder", lambda: tmp_path)
    assert kvpress_agreement.main(["--write", str(tmp_path / "kept.safetensors")]) == 0
    with safe_open(tmp_path / "kept.safetensors", "pt") as file:
        ids, kept = file.get_tensor("ids"), [file.get_tensor(f"keys.{layer}") for layer in range(LAYERS)]
        assert file.metadata() == {"model": str(tmp_path)}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, **cache_argument(model, cache))
    assert ids.shape == (1, 1000) and all(keys.shape[2] == 250 for keys in kept)
    for keys, whole in zip(kept, (layer.keys for layer in cache.layers), strict=True):
        assert kvpress_agreement.same(keys[:, :, -20:], whole[:, :, -20:])
        places = [(whole[0, 0] - key).abs().amax(-1).argmin().item() for key in keys[0, 0]]
        assert places == sorted(set(places)) and all(place % 10 == index % 10 for index, place in enumerate(places))
        assert not kvpress_agreement.same(keys, whole) and not kvpress_agreement.same(keys, keys.flip(2))
