"""The benchmark of speculative decoding over a tiny model on the CPU."""

import pytest

from benchmarks import speculate
from benchmarks.report.records import SpeculateRecord, read
from zigzag_ext.speculation import loop
from zigzag_ext.speculation.lookup import Lookup


def test_rounds_and_parts(tmp_path, monkeypatch, capsys):
    for name, value in {"NEW": 24, "WARM_UP": 6, "STEPS": 2}.items():
        monkeypatch.setattr(speculate, name, value)
    before, path = (loop.accept_greedy, Lookup.draft), tmp_path / "speculate.csv"
    arguments = ["--device", "cpu", "--model", "tiny", "--eager", "--context", "500", "--batch", "1,2", "--commit", "abc"]
    assert speculate.main([*arguments, "--csv", str(path)]) == 0
    rows = read(path, SpeculateRecord)
    ours, peer = [row for row in rows if row.impl != "transformers_lookup"], rows[-1]
    assert len(ours) == len(rows) - 1 == 2 * (1 + 4 + 2 + len(speculate.ROUNDS)) and (loop.accept_greedy, Lookup.draft) == before
    assert all(row.wall_ms > 0 and row.ms_per_token > 0 for row in rows if row.phase != "generate")
    assert (peer.impl, peer.batch, peer.tokens) == ("transformers_lookup", 1, 7) and 24 / 8 <= peer.rounds < 20
    rounds = {(row.batch, row.draft, row.tokens, row.acceptance): row.rounds for row in ours if row.phase == "round"}
    for batch in (1, 2):
        assert rounds[batch, "off", 1, 0.0] == rounds[batch, "lookup, no match", 7, 0.0] == 23
        assert abs(rounds[batch, "magicdec", 3, 0.8] - rounds[batch, "streaming", 3, 0.8]) < 12
        assert rounds[batch, "streaming", 7, 0.8] < rounds[batch, "streaming", 3, 0.8] * 1.5 < 23 * 1.5
    capsys.readouterr()
    assert speculate.main([*arguments, "--csv", str(path)]) == 0
    assert capsys.readouterr().out.count("already") == 3 and len(read(path, SpeculateRecord)) == len(rows)


def test_the_chance_of_a_quoted_token_gives_the_rounds_that_it_stands_for():
    chance = speculate.QUOTED
    assert sum(chance**n for n in range(8)) == pytest.approx(2.75, abs=0.03)
