"""The quality benchmark of quantised caches: scoring uses the plan's formats, the emulations are what they say, runs resume."""

from dataclasses import replace

import pytest
import torch
from character_model import one_thread  # noqa: F401

import zigzag_ext as zz
from benchmarks import kv_quality
from benchmarks.report import quality as quality_report
from benchmarks.report import records
from zigzag_ext.cli import demo
from zigzag_ext.study import evaluate
from zigzag_ext.study.evaluate.scoring import score

PLAN = zz.Plan(["streaming", "retrieval", "retrieval"], sink=4, window=32)


def logprobs(model, tokenizer, plan):
    return [verdict.logprob for verdict in score(model, evaluate.passkey.samples(tokenizer, 420, [0.2], 3), plan)]


@pytest.mark.parametrize("smoothing", [False, True])
def test_the_emulation_of_symmetric_int4_is_the_kernels_int4(model, tokenizer, smoothing):
    """And the plan's formats reach the scoring."""
    plan = replace(PLAN, kv_format="int4", key_smoothing=smoothing)
    kernels, plain = logprobs(model, tokenizer, plan), logprobs(model, tokenizer, PLAN)
    with kv_quality.emulated(model, PLAN, kv_quality.symmetric_int4, smoothing):
        emulated = logprobs(model, tokenizer, None)
    difference = max(abs(a - b) for a, b in zip(kernels, emulated, strict=True))
    assert max(abs(a - b) for a, b in zip(kernels, plain, strict=True)) > 1e-3
    assert difference < 1e-3, difference


def test_codecs():
    """At most half a step off, where 15 steps are the range of a vector, or 7 its largest magnitude."""
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) + 3
    step = (x.amax(-1) - x.amin(-1)) / 15
    assert ((kv_quality.zero_point_int4(x) - x).abs() <= step[:, None] * 0.5001).all()
    assert ((kv_quality.symmetric_int4(x) - x).abs() <= x.abs().amax(-1)[:, None] / 14 * 1.0001).all()
    constant = torch.full((2, 64), 3.0)
    assert kv_quality.zero_point_int4(constant).equal(constant)
    k = torch.randn(1, 2, 40, 64) + 100
    assert (kv_quality.less_mean(kv_quality.symmetric_int4)(k) - k).abs().max() < 1
    assert (kv_quality.symmetric_int4(k) - k).abs().max() > 2


def test_a_run_a_second_run_and_the_report(model, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "load", lambda device, dtype: (model, tokenizer))
    monkeypatch.setattr(demo, "demo_plans", lambda: {"full": zz.Plan(["retrieval"] * 3, sink=4, window=32), "good plan": PLAN})
    path = tmp_path / "kv_quality.csv"
    command = ["--tokens", "420", "--passages", "1", "--prompts", "1", "--csv", str(path), "--commit", "abc"]
    assert kv_quality.main(command) == 0
    rows = records.read(path, records.QualityRecord)
    assert len(rows) == 2 * 2 * 11 == len({row.cell for row in rows})
    assert {row.plan for row in rows} == {"full", "good"} and {(row.task, row.samples) for row in rows} == {
        ("perplexity", 1),
        ("passkey", 5),
    }
    path.write_text("\n".join(path.read_text().splitlines()[:-3]) + "\n")
    capsys.readouterr()
    assert kv_quality.main(command) == 0
    assert capsys.readouterr().out.count("QualityRecord") == 3
    assert records.read(path, records.QualityRecord) == rows

    page = tmp_path / "page.md"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*quality_report.markers(quality_report.NAME)))
    assert quality_report.write(path, page) == 0
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n") and "old" not in text
    assert text.count("\n| full |") == 11 and "int4, zero point (emulated)" in text and "commit abc" in text
    page.write_text("no markers")
    assert quality_report.write(path, page) == quality_report.write(tmp_path / "none.csv", page) == 1
