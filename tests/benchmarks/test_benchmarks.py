"""The benchmark scripts: the CSV they share, the report, and a run over tiny cells from end to end."""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import decode
from benchmarks.cells import problem, scenarios
from benchmarks.cells.arguments import token_counts
from benchmarks.cells.scenarios import Cell, ring
from benchmarks.peers import attention as peers
from benchmarks.report import records
from benchmarks.timing import clock

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = [
    Cell("full", (70,), num_q_heads=8, num_kv_heads=2, head_dim=64),
    Cell("ragged", (5, 33), num_q_heads=4, num_kv_heads=4, head_dim=64, kv_format="fp32"),
    Cell("verify", (40,), num_q_heads=4, num_kv_heads=2, head_dim=64, q_len=3),
    ring("ring", 3, 9, batch=2, num_q_heads=4, num_kv_heads=2, head_dim=64, kv_format="fp16"),
    Cell("quantised", (50,), num_q_heads=4, num_kv_heads=2, head_dim=64, kv_format="int8/int4"),
]
ORIGIN = {"commit": "abc", "gpu": "test machine, no GPU", "driver": "-", "torch": "0"}


@pytest.fixture
def fast(monkeypatch):
    """Two sets of buffers and few samples, for speed."""
    monkeypatch.setattr(problem, "COLD_BYTES", 1)
    monkeypatch.setattr(clock, "COPY_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(clock, "CPU_SECONDS", 0.0)
    monkeypatch.setitem(scenarios.BY_DEVICE, "cpu", TINY)


def row(cell: Cell, impl: str, p50: float) -> records.Record:
    return decode.record(cell, impl, clock.Quantiles(p50 * 0.9, p50, p50 * 1.1), 100.0, ORIGIN)


def synthetic(driver: str = "-") -> list[records.Record]:
    times = {"zigzag": 1.0, "fast_peer": 1.5, "slow_peer": 4.0, "read": 0.5}
    rows = [row(cell, impl, factor * cell.kv_bytes / 1e6) for cell in scenarios.CUDA for impl, factor in times.items()]
    return [replace(each, driver=driver) for each in rows]


def test_csv_round_trip(tmp_path):
    rows = [replace(r, p20_us=1.5, p50_us=2.25, p80_us=3.125, gbps=7.0, pct_copy=8.5) for r in synthetic()]
    records.write(tmp_path / "a.csv", rows)
    assert records.read(tmp_path / "a.csv") == rows


def test_csv_columns_are_those_of_the_cpp_programs(tmp_path):
    table = (BENCHMARKS / "cpp" / "table.cpp").read_text()
    literals = "".join(part for part in table.split("kColumns =")[1].split(";")[0].split('"')[1::2])
    assert literals.split(",") == records.COLUMNS


def test_csv_with_other_columns_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("commit,gpu\nx,y\n")
    with pytest.raises(ValueError, match="a.csv: columns are"):
        records.read(tmp_path / "a.csv")


@pytest.mark.parametrize(
    "damage", [lambda line: line[:-9], lambda line: line[:-2], lambda line: line[:-1] + ",1\n", lambda _: "\n"]
)
def test_a_damaged_line_is_named(tmp_path, damage):
    """Such as an interrupted run leaves: a torn line is never taken for one with a shorter number."""
    records.write(tmp_path / "a.csv", synthetic()[:2])
    *lines, last = (tmp_path / "a.csv").read_text().splitlines(keepends=True)
    (tmp_path / "a.csv").write_text("".join(lines) + damage(last))
    with pytest.raises(ValueError, match=r"a\.csv:3: the line is damaged"):
        records.read(tmp_path / "a.csv")


@pytest.mark.parametrize("cell", scenarios.CUDA + scenarios.CPU, ids=lambda cell: f"{cell.scenario}-{cell.kv_format}")
def test_scenarios_are_consistent(cell):
    assert cell.slots <= 4 << 20 and cell.num_q_heads % cell.num_kv_heads == 0
    assert all(length >= cell.q_len for length in cell.kv_lens)
    record = row(cell, "zigzag", 1.0)
    assert record.ragged == (len(set(cell.kv_lens)) > 1)


def test_ragged_scenarios_compare_equal_bytes():
    by_name = {cell.scenario: cell for cell in scenarios.CUDA}
    assert by_name["ragged_64k_31x4k"].kv_bytes == by_name["ragged_uniform_32x6016"].kv_bytes


def test_quantiles():
    assert clock.quantiles([float(x) for x in range(11)]) == clock.Quantiles(2.0, 5.0, 8.0)


@pytest.mark.parametrize("count,positions", [(2, 2), (2, 3), (3, 2), (3, 30), (8, 10)])
def test_no_implementation_finds_buffers_that_another_has_just_read(monkeypatch, count, positions):
    monkeypatch.setattr(clock, "CPU_SECONDS", 0.0)
    visits = []
    clocks = {str(i): clock.CallClock(visits.append, positions, 1) for i in range(count)}
    visits.clear()
    clock.measure("cpu", clocks)
    assert len(visits) == count * clock.CPU_MIN_SAMPLES
    assert visits == [i % positions for i in range(len(visits))]


def test_report_fills_the_documents_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.report import __main__ as report
    from benchmarks.report import documents

    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    records.write(results / "decode.csv", synthetic(driver="1.2"))
    records.write(results / "decode_cpu.csv", synthetic())
    opening, closing = documents.markers("decode")
    for name in report.DOCUMENTS:
        (tmp_path / name).write_text(f"before\n{opening}\nold\n{closing}\nafter\n")
    assert report.main(["--results", str(results), "--root", str(tmp_path)]) == 0

    readme, performance, _, complete = ((tmp_path / name).read_text() for name in report.DOCUMENTS)
    for document in (readme, performance, complete):
        assert document.startswith("before\n") and document.endswith("after\n") and "old" not in document
    line = next(line for line in readme.splitlines() if line.startswith("| 1 x 4,096 keys, 32/8"))
    assert "(fast_peer) | 1.50x | 1,000 | 1000% |" in line
    assert readme.count("| 1.50x |") == 2 * sum(cell.quick for cell in scenarios.CUDA)
    assert performance.count("| 1.50x |") == 10 and "slow_peer" not in performance
    assert "(../benchmarks/results/decode.csv)" in performance and "decode_cpu.csv" not in performance
    assert complete.count("| 1.50x |") == 2 * len(scenarios.CUDA)
    assert "slow_peer" in complete and "32 rows of up to 65,536 keys" in complete
    assert "(benchmarks/results/decode.csv)" in readme and "(decode.csv)" in complete
    for name in ("decode.png", "decode_ring.png"):
        assert (tmp_path / "docs" / "figures" / name).stat().st_size > 10_000


def test_report_names_what_it_skips(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from benchmarks.report import __main__ as report

    assert report.main(["--results", str(tmp_path), "--root", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().err
    records.write(tmp_path / "decode.csv", synthetic()[:1])
    assert report.main(["--results", str(tmp_path), "--root", str(tmp_path)]) == 0
    assert "README.md: decode skipped" in capsys.readouterr().out


def test_run_on_the_cpu_end_to_end(fast, tmp_path, capsys):
    assert decode.main(["--device", "cpu", "--csv", str(tmp_path / "cpu.csv"), "--commit", "abc"]) == 0
    out = capsys.readouterr().out
    rows = records.read(tmp_path / "cpu.csv")
    timed = {(r.scenario, r.impl) for r in rows}
    assert {(cell.scenario, "zigzag") for cell in TINY} <= timed
    assert {("full", "torch_sdpa_gqa"), ("full", "torch_sdpa_packed"), ("ring", "torch_sdpa_gqa")} <= timed
    assert "unsupported: rows of equal length only" in out and "unsupported: one new token only" in out
    for r in rows:
        assert 0 < r.p20_us <= r.p50_us <= r.p80_us and r.commit == "abc" and r.torch == torch.__version__
        assert math.isclose(r.gbps, r.bytes / r.p50_us * 1e-3, rel_tol=0.05, abs_tol=2e-3)


class Broken:
    """A stand-in for a peer module whose run returns what `change` makes of the right output."""

    DEVICES = ("cpu",)

    def __init__(self, change):
        self.change = change

    def prepare(self, case):
        return lambda i: self.change(case.expected)


def raise_(error):
    raise error


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda out: out * 1.05, "wrong: relative error"),
        (lambda out: out * torch.nan, "wrong: relative error"),
        (lambda out: out[:, :1], "failed: ValueError: output has shape"),
        (lambda out: raise_(RuntimeError("boom\nmore")), "failed: RuntimeError: boom"),
        (lambda out: raise_(ImportError("No module named 'x'")), "missing: No module named 'x'"),
    ],
    ids=["off", "nan", "shape", "exception", "import"],
)
def test_a_broken_peer_is_named_and_not_timed(fast, change, reason):
    modules = {"broken": Broken(change), "right": Broken(lambda out: out)}
    clocks, _, reasons = decode.prepare_all(problem.Problem(TINY[0], "cpu"), modules)
    assert list(clocks) == ["right"] and list(reasons) == ["broken"]
    assert reasons["broken"].startswith(reason)


def test_a_failure_of_ours_fails_the_run(fast, monkeypatch, capsys):
    monkeypatch.setattr(peers, "for_device", lambda device: {"zigzag": Broken(lambda out: out * 2)})
    assert decode.main(["--device", "cpu", "--scenario", "full"]) == 1
    assert "zigzag failed in: full" in capsys.readouterr().err


def test_unknown_names_list_the_known_ones(fast):
    with pytest.raises(SystemExit, match="unknown peer x; known: zigzag, torch_sdpa_gqa, torch_sdpa_packed"):
        decode.main(["--device", "cpu", "--peer", "x"])


def test_every_peer_file_is_registered():
    files = {path.stem for path in (BENCHMARKS / "peers" / "attention").glob("[!_]*.py")}
    assert files == {*peers.for_device("cpu"), *peers.for_device("cuda")}


def test_tokens_are_numbers_or_thousands():
    assert token_counts("4096,32K") == [4096, 32 * 1024]
    with pytest.raises(argparse.ArgumentTypeError, match="such as 4096 or 32K; got '0K'"):
        token_counts("4K,0K")
