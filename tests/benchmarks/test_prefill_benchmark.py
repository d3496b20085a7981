"""benchmarks/prefill.py over tiny cells on the CPU: what it checks, writes, skips and concludes."""

from dataclasses import replace

import pytest
import torch

from benchmarks import prefill as bench
from benchmarks.cells import prefill_cells
from benchmarks.cells.prefill_cells import PrefillCell, PrefillProblem
from benchmarks.report import comparisons, records
from zigzag_ext.attention import reference

SHAPE = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64, "dtype": torch.float32}
TINY = [
    PrefillCell("streaming_tiny", 90, sink=3, window=20, impls=("zigzag", "full_torch_cpu"), **SHAPE),
    PrefillCell("retrieval_tiny", 70, impls=("zigzag", "zigzag_kernel", "torch_cpu", "cudnn"), **SHAPE),
    PrefillCell("short_tiny", 40, 50, impls=("zigzag", "decode_calls", "route_torch_cpu", "torch_cpu"), **SHAPE),
    PrefillCell("prefill_int4_tiny", 40, 30, impls=("zigzag", "decode_calls", "route_torch_cpu"), kv_format="int4", **SHAPE),
]


def read(path):
    return records.read(path, records.PrefillRecord)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(prefill_cells.BY_DEVICE, "cpu", TINY)
    monkeypatch.setattr(bench, "SECONDS", 0.0)


@pytest.mark.parametrize(
    "tokens,past,sink,window", [(1, 0, 3, 5), (50, 0, 3, 5), (50, 7, 0, 1), (9, 0, 20, 30), (40, 100, 8, 16), (33, 5, 0, 0)]
)
def test_pairs_are_those_of_the_reference(tokens, past, sink, window):
    cell = PrefillCell("x", tokens, past, sink, window)
    query, key = torch.arange(past, past + tokens)[:, None], torch.arange(past + tokens)
    assert cell.keys_seen() == reference.visible(key, query, sink, window).sum()
    assert cell.keys_seen("full_cudnn") == reference.visible(key, query, 0, 0).sum()
    assert cell.keys_seen("cudnn_dense") == tokens * (past + tokens)


def test_end_to_end_and_again(tiny, tmp_path, capsys):
    path = tmp_path / "p.csv"
    assert bench.main(["--device", "cpu", "--csv", str(path), "--commit", "abc", "--scenario", "streaming,retrieval"]) == 0
    first = read(path)
    assert bench.main(["--device", "cpu", "--csv", str(path), "--commit", "abc"]) == 0
    out, rows = capsys.readouterr().out, read(path)
    assert rows[: len(first)] == first and out.count("streaming_tiny: 90 tokens") == 1 and "retrieval_tiny: in" in out
    assert {(r.scenario, r.impl) for r in rows} == {
        (cell.scenario, impl)
        for cell in TINY
        for impl in cell.impls
        if impl != "cudnn" and (impl, cell.past) != ("torch_cpu", 50)
    }
    assert "unsupported: cudnn does not serve torch.float32" in out and "unsupported: causal with more keys than queries" in out
    for r in rows:
        assert 0 < r.p20_us <= r.p50_us <= r.p80_us and r.commit == "abc" and r.flops > 0
    assert next(r for r in rows if r.impl == "full_torch_cpu").window == 0
    assert out.count("streaming layer in percent of the best full layer") == 2
    assert bench.main(["--device", "cpu", "--csv", str(path), "--commit", "other", "--scenario", "short"]) == 0
    assert len(read(path)) == len(rows) + 3


@pytest.mark.parametrize(
    "change,reason", [(lambda o: o * 1.001, "wrong: relative error 1.0e-03"), (lambda o: o * torch.nan, "wrong")]
)
def test_wrong_output_is_named_and_fails_the_run(tiny, monkeypatch, capsys, change, reason):
    right = bench.prepare
    monkeypatch.setattr(
        bench, "prepare", lambda impl, p: lambda: change(right(impl, p)()) if impl == "zigzag" else right(impl, p)()
    )
    assert bench.main(["--device", "cpu", "--scenario", "short"]) == 1
    captured = capsys.readouterr()
    assert reason in captured.out and "zigzag failed in: short_tiny" in captured.err


@pytest.mark.parametrize("cell", TINY, ids=lambda cell: cell.scenario)
def test_the_oracle_sees_what_the_reference_sees(cell):
    problem = PrefillProblem(cell, "cpu")
    q, k, v = problem.q.double(), problem.keys.double(), problem.values.double()
    halves = [t[:, :, : cell.past] for t in (k, v)], [t[:, :, cell.past :] for t in (k, v)]
    ring = {"sink": cell.sink, "window": cell.window}
    out, _ = reference.attention(q, *halves[1], *halves[0], problem.lengths, **ring, scale=problem.scale)
    assert problem.error(out, "zigzag") < 1e-12
    other = replace(cell, window=cell.window + 1) if cell.window else cell
    assert not cell.window or PrefillProblem(other, "cpu").error(out, "zigzag") > 1e-4


@pytest.mark.parametrize("cells", prefill_cells.BY_DEVICE.values(), ids=prefill_cells.BY_DEVICE.keys())
def test_scenarios_are_consistent(cells):
    assert len({cell.scenario for cell in cells}) == len(cells)
    for cell in cells:
        assert "zigzag" in cell.impls and cell.num_q_heads % cell.num_kv_heads == 0 and not (cell.window and cell.past)


def test_comparisons():
    """The comparisons, from made-up times."""

    def row(scenario, impl, p50, tflops=1.0):
        return records.PrefillRecord("c", "g", "d", "t", impl, scenario, 1, 32, 8, 128, 1, 0, 0, 0, p50, p50, p50, 1, tflops)

    rows = [
        row("streaming_128k", "zigzag", 3.0),
        row("streaming_128k", "full_cudnn", 200.0),
        row("streaming_128k", "full_fa3", 150.0),
    ]
    rows += [
        row("streaming_64k", "zigzag", 1.0),
        row("streaming_64k", "flex_attention", 4.0),
        row("streaming_256k", "zigzag", 4.1),
    ]
    rows += [row("retrieval_16k", "zigzag", 10.2), row("retrieval_16k", "flash", 20.0), row("retrieval_16k", "cudnn", 10.0)]
    rows += [row("retrieval_16k", "route_fa3", 8.4), row("retrieval_16k", "fa3", 8.0)]
    rows += [row("chunk_8k", "zigzag", 1.0, 90.0), row("chunk_8k", "cudnn_dense", 1.0, 100.0)]
    lines = "\n".join(comparisons.of_chunks(rows))
    for expected in (
        "best full layer: 2.00",
        "FlexAttention: 4.00",
        "256k: 4.10 times",
        "torch's best: 1.020",
        "over fa3: 1.050",
        "dense TFLOP/s: 90.0",
    ):
        assert expected in lines


def test_other_columns_and_names_are_refused(tmp_path):
    (tmp_path / "p.csv").write_text("commit,gpu\n")
    with pytest.raises(ValueError, match="p.csv: columns are"):
        read(tmp_path / "p.csv")
    with pytest.raises(SystemExit, match="unknown scenario x; known: streaming_16k"):
        bench.main(["--device", "cuda", "--scenario", "x"])
