"""The benchmark of first compiled tokens, without compiling: what it times, in which processes, and what it writes."""

from types import SimpleNamespace

import zigzag_ext as zz
from benchmarks import start
from benchmarks.report.records import StartRecord, read


def test_one_row_and_then_two_are_timed(monkeypatch):
    compiled, enabled = [], zz.zigzag
    monkeypatch.setattr(zz, "zigzag", lambda model, plan, compile=False: compiled.append(compile) or enabled(model, plan))
    starts = start.time_starts("tiny", "cpu", "exclusive_50")
    assert [batch for batch, _ in starts] == [1, 2] and all(seconds > 0 for _, seconds in starts)
    assert compiled == [False, True]


def test_a_warm_compiler_cache_is_what_the_empty_one_has_become(monkeypatch, tmp_path):
    calls = []

    def run(command, env, **options):
        calls.append((command, env["TORCHINDUCTOR_CACHE_DIR"], env["TRITON_CACHE_DIR"]))
        return SimpleNamespace(stdout=f"something else\nstart 1 {3 - len(calls)}.5\nstart 2 0.25\n")

    monkeypatch.setattr(start, "subprocess", SimpleNamespace(run=run, PIPE=-1))
    path = tmp_path / "start.csv"
    assert start.main(["--device", "cpu", "--model", "tiny", "--csv", str(path), "--commit", "abc"]) == 0
    found = [(row.cache, row.batch, row.seconds) for row in read(path, StartRecord)]
    assert found == [("empty", 1, 2.5), ("empty", 2, 0.25), ("warm", 1, 1.5), ("warm", 2, 0.25)]
    assert len(calls) == 2 and calls[0] == calls[1] and "--here" in calls[0][0]
