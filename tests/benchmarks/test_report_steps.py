"""Tables and figures of whole models and prompt chunks, from made-up rows."""

import pytest

pytest.importorskip("matplotlib")

from benchmarks.report import __main__ as report
from benchmarks.report import documents, records
from benchmarks.report.records import CapacityRecord, PrefillRecord, StepRecord

ORIGIN = ("abc", "GPU", "1.2", "2.11")


def step(phase, context, plan, impl, wall, kv):
    return StepRecord(
        *ORIGIN, "5.17", "llama3-8b", phase, context, plan, impl, wall, wall / 2, 336.0, kv, kv + 17 * 10**9, 16 * 10**9
    )


def write_results(results):
    """A CSV of every kind of result."""
    rows = [
        step(phase, context, plan, impl, context / 1024 + index, context * 1000)
        for context in (4096, 131072)
        for index, (plan, impl) in enumerate([("exclusive_50", "zigzag_compiled"), ("full", "transformers_compiled")])
        for phase in ("step", "generate")
    ]
    rows += [step("prefill", 327680, "retrieval_100", "zigzag_eager", 60_000.0, 10**9)]
    rows += [step("prefill", 327680, "exclusive_50", "zigzag_eager", 30_000.0, 10**9)]
    with records.writer(results / "step.csv", StepRecord) as add:
        for row in rows:
            add(row)
    with records.writer(results / "capacity.csv", CapacityRecord) as add:
        numbers = (4_000_000, 32, 50.0, 51.0, 49.0, 400.0, 3000.0, 27.5, 9 * 10**9, 70 * 10**9, 80 * 10**9, 81 * 10**9, 4, 0.25)
        add(CapacityRecord(*ORIGIN, "5.17", "0.18", "llama3-8b", "int8", "exclusive_50", "int4", "zigzag_eager", *numbers))
    chunk = ("streaming_128k", 1, 32, 8, 128, 131072, 0)
    ours = PrefillRecord(*ORIGIN, "zigzag", *chunk, 64, 256, 4000.0, 4100.0, 4200.0, 10**12, 163.0)
    peer = PrefillRecord(*ORIGIN, "full_cudnn", *chunk, 0, 0, 4e5, 4.1e5, 4.2e5, 10**14, 570.0)
    with records.writer(results / "prefill.csv", PrefillRecord) as add:
        add(ours)
        add(peer)
    chain = ORIGIN[:3] + ("-", "step"), ("1x4K_16of32", "bf16", 1, 32, 8, 128, 1, 4096, 64, 256)
    records.write(
        results / "layers_cpp.csv",
        [
            records.Record(*chain[0], impl, *chain[1], 1.0, time, 1.0, 10**9, 2000.0, 50.0)
            for impl, time in (("zigzag", 500.0), ("read", 400.0))
        ],
    )


def test_every_kind_of_result_gets_its_table(tmp_path):
    results, docs = tmp_path / "benchmarks" / "results", tmp_path / "docs"
    results.mkdir(parents=True), docs.mkdir()
    write_results(results)
    places = "\n".join("\n".join(documents.markers(kind)) for kind in ("layers", *report.KINDS))
    for name in report.DOCUMENTS:
        (tmp_path / name).write_text(places)

    assert report.main(["--results", str(results), "--root", str(tmp_path)]) == 0
    readme, performance, _, complete = ((tmp_path / name).read_text() for name in report.DOCUMENTS)
    row = "| llama3-8b | 128K | 50% of layers retrieve | zigzag_ext, compiled | 128.00 | 128.00 | 64.00 | 336 | 0.13 | 17.1 |"
    assert row in readme and row in performance and row in complete
    assert "| llama3-8b | 4K |" in complete and "| llama3-8b | 4K |" not in readme + performance
    assert "| 1x4K_16of32 | 500 | 400 | 80% | 2,000 |" in complete
    assert "| llama3-8b | 320K | 50% of layers retrieve | zigzag_ext, eager | 30.00 | 2.00x | 1.00 | 1.00 |" in complete
    assert (
        "| 4,000,000 | 50% of layers retrieve | int8 | int4 | zigzag_ext, eager | 50.0 | 27.5 | 70.0 | 81.0 | 0.25% |" in complete
    )
    assert "in percent of the best full layer: 1.00" in complete and "| streaming_128k | zigzag | 131,072 |" in complete
    for name in ("step_latency.png", "step_memory.png"):
        assert (docs / "figures" / name).stat().st_size > 10_000
