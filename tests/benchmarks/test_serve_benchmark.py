"""The benchmark of many requests, over a tiny model on the CPU: every scenario, and what its numbers are made of."""

import pytest

import zigzag_ext as zz
from benchmarks import serve
from benchmarks.cells import http_clients, serve_scenarios
from benchmarks.cells.models import build_model, make_plan
from benchmarks.cells.serve_scenarios import Job
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


def test_transformers_own_batching_is_measured(tmp_path):
    path = tmp_path / "serve.csv"
    assert serve.main([*CPU, "--scenario", "whole", "--impl", "generate_batch", "--rows", "2", "--csv", str(path)]) == 0
    rows = read(path, ServeRecord)
    assert [(row.scenario, row.plan, row.new_tokens) for row in rows][0] == ("whole", "full", 10) and rows[0].first_p50_s > 0


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
