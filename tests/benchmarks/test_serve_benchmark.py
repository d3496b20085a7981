"""The benchmark of many requests, over a tiny model on the CPU: every scenario, and what its numbers are made of."""

from contextlib import nullcontext
from importlib.util import find_spec

import pytest
import transformers
from packaging.version import Version

import zigzag_ext as zz
from benchmarks import serve
from benchmarks.cells import http_clients, serve_scenarios
from benchmarks.cells.models import build_model, make_plan
from benchmarks.cells.problem import Unsupported
from benchmarks.cells.serve_scenarios import Job
from benchmarks.peers import generate_batch
from benchmarks.report.records import ServeRecord, read
from benchmarks.timing.token_times import Times, all_decode, summary

CPU = ["--device", "cpu", "--model", "tiny", "--commit", "abc", "--prompt", "40", "--new", "5", "--plan", "exclusive_50"]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(serve_scenarios, "IDLE_STEPS", 3)
    monkeypatch.setattr(serve_scenarios, "CHUNK", 24)
    monkeypatch.setattr(serve, "CHUNK", 24)
    monkeypatch.setattr(http_clients, "ROUNDS", 1)


def test_numbers_are_made_of_the_times_of_tokens():
    requests = [Times(0.0, [1.0, 1.5, 2.0, 4.0]), Times(1.0, [1.2, 1.9, 2.2])]
    assert all_decode(requests) == (1.2, 2.2)
    whole = summary(requests)
    assert (whole["new_tokens"], whole["wall_s"], whole["tokens_per_s"]) == (7, 4.0, 7 / 4)
    assert whole["first_p50_s"] == pytest.approx(0.6) and whole["between_p50_ms"] == pytest.approx(500)
    steady = summary(requests, (1.2, 2.2))
    assert (steady["new_tokens"], steady["wall_s"], steady["first_p99_s"]) == (5, pytest.approx(1.0), 0.0)
    assert steady["between_p50_ms"] == pytest.approx(500) and steady["between_p99_ms"] < 701


def test_every_scenario_of_an_engine_is_written_once(tmp_path, capsys):
    path = tmp_path / "serve.csv"
    arguments = [
        *CPU,
        "--scenario",
        "steady,whole,stall,prefix",
        "--impl",
        "engine,generate",
        "--rows",
        "1,3",
        "--csv",
        str(path),
    ]
    assert serve.main(arguments) == 0
    rows = {(row.scenario, row.impl, row.rows): row for row in read(path, ServeRecord)}
    parts = {"stall": ("long prompt alone", "rows alone", "rows beside", "long prompt beside", "short prompt beside")}
    parts |= {"prefix": ("read", "held", "shared")}
    wanted = {(f"{scenario}: {part}", "engine", n) for scenario, names in parts.items() for part in names for n in (1, 3)}
    wanted |= {(scenario, "engine", n) for scenario in ("steady", "whole") for n in (1, 3)} | {("steady", "generate", 1)}
    assert set(rows) == wanted and len(read(path, ServeRecord)) == len(wanted)
    assert rows["steady", "engine", 3].new_tokens >= 3 * 5 and rows["whole", "engine", 3].new_tokens == 15
    assert all(row.wall_s > 0 and row.tokens_per_s > 0 and row.prompt == 40 for row in rows.values())
    assert rows["prefix: read", "engine", 3].cached_tokens == 0 and rows["prefix: shared", "engine", 3].cached_tokens == 3 * 24
    assert rows["whole", "engine", 1].first_p50_s > 0 < rows["steady", "generate", 1].between_p50_ms
    assert serve.main(arguments) == 0 and len(read(path, ServeRecord)) == len(wanted)
    assert capsys.readouterr().out.count("already") == 9


def test_capacity_is_as_many_rows_as_have_memory(tmp_path, monkeypatch):
    model, job = build_model("tiny", "cpu"), Job(1, 40, 5)
    plan, memory = make_plan("exclusive_50", model.config), 6_000_000
    found = serve.most_rows(model, plan, job, memory)
    tokens = found.prompt + serve_scenarios.filled(found)
    assert found.rows > 2
    for rows, fits in ((found.rows, True), (found.rows + 1, False)):
        with zz.Engine(model, plan, max_len=1000, max_rows=rows, memory=memory) as engine:
            assert (engine.capacity(tokens - 1, 1) == rows) == fits
    path = tmp_path / "serve.csv"
    monkeypatch.setattr(serve, "most_rows", lambda *args: found)
    assert serve.main([*CPU, "--scenario", "capacity", "--csv", str(path)]) == 0
    [row] = read(path, ServeRecord)
    assert (row.scenario, row.rows) == ("capacity", found.rows) and row.kv_bytes > 0 and row.new_tokens >= 5 * found.rows


def test_transformers_own_batching_is_measured_or_refused_by_name(tmp_path, capsys):
    path = tmp_path / "serve.csv"
    assert serve.main([*CPU, "--scenario", "whole", "--impl", "generate_batch", "--rows", "2", "--csv", str(path)]) == 0
    rows = read(path, ServeRecord)
    if Version(transformers.__version__) < Version("5.6") and find_spec("opentelemetry"):
        message = f"whole full generate_batch: unsupported: continuous batching of transformers {transformers.__version__} fails"
        assert not rows and message in capsys.readouterr().out
    else:
        assert [(row.scenario, row.plan, row.new_tokens) for row in rows][0] == ("whole", "full", 10)
        assert rows[0].first_p50_s > 0


@pytest.mark.parametrize("version, telemetry, works", [("5.4.0", True, False), ("5.4.0", False, True), ("5.6.0", True, True)])
def test_versions_whose_own_batching_fails(monkeypatch, version, telemetry, works):
    monkeypatch.setattr(transformers, "__version__", version)
    monkeypatch.setattr(generate_batch, "find_spec", lambda name: telemetry)
    with nullcontext() if works else pytest.raises(Unsupported, match="transformers 5.4.0 fails .*; 5.6 does not"):
        generate_batch.check_batching()


@pytest.mark.parametrize("error, kind", [(RuntimeError, "failed: RuntimeError"), (Unsupported, "unsupported")])
def test_a_peer_that_fails_is_reported_and_the_others_are_measured(tmp_path, capsys, monkeypatch, error, kind):
    def fails(*args):
        raise error("no such thing")

    path = tmp_path / "serve.csv"
    arguments = [*CPU, "--scenario", "whole", "--rows", "1,2", "--csv", str(path)]
    monkeypatch.setattr(serve.generate_batch, "generate_batch", fails)
    assert serve.main(arguments) == 0
    assert [(row.impl, row.rows) for row in read(path, ServeRecord)] == [("engine", 1), ("engine", 2)]
    assert capsys.readouterr().out.count(f"whole full generate_batch: {kind}: no such thing\n") == 2
    path.unlink()
    monkeypatch.setattr(serve, "on_engine", fails)
    with pytest.raises(error, match="no such thing"):
        serve.main(arguments)


@pytest.mark.slow
def test_clients_of_a_server_are_measured(tmp_path):
    path = tmp_path / "serve.csv"
    assert serve.main([*CPU, "--scenario", "server", "--impl", "zigzag_server", "--rows", "3", "--csv", str(path)]) == 0
    [row] = read(path, ServeRecord)
    assert (row.scenario, row.impl, row.new_tokens) == ("server", "zigzag_server", 15) and 0 < row.first_p50_s < row.wall_s


def test_unknown_names_are_refused(capsys):
    for option in ("--scenario", "--plan", "--impl"):
        with pytest.raises(SystemExit):
            serve.main([*CPU, option, "nothing"])
        assert "unknown nothing; known:" in capsys.readouterr().err
