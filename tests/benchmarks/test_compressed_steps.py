"""The benchmark of steps behind compressed prompts over a tiny model on the CPU, and its table."""

from benchmarks import compressed_steps
from benchmarks.report.__main__ import main as report
from benchmarks.report.records import CompressedRecord, read
from zigzag_ext.hf.compiled import _Step


def test_a_run_and_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed_steps, "NEW", 8)
    before, path = _Step._capture, tmp_path / "compressed.csv"
    arguments = ["--device", "cpu", "--model", "tiny", "--eager", "--context", "1K", "--batch", "1,2", "--commit", "abc"]
    assert compressed_steps.main([*arguments, "--csv", str(path)]) == 0
    one, two = read(path, CompressedRecord)
    assert (one.batch, two.batch, one.context, one.kept) == (1, 2, 1024, two.kept) and 0.1 * 1024 < one.kept <= 0.12 * 1024
    assert two.kv_bytes == 2 * one.kv_bytes <= two.budget_bytes and one.new_captures == 0 and _Step._capture is before
    assert all(min(row.prompt_s, row.choice_s, row.step_ms, row.kept_ms) > 0 for row in (one, two))

    document = tmp_path / "benchmarks" / "results" / "README.md"
    document.parent.mkdir(parents=True)
    document.write_text("<!-- results:compressed -->\n<!-- /results:compressed -->\n")
    assert report(["--results", str(tmp_path), "--root", str(tmp_path)]) == 0
    assert document.read_text().count("| tiny | 50% of layers retrieve | windows 0.12 | 1K |") == 2
