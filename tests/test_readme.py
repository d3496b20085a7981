"""The README's first program, as it stands, on the demo's copy of the same weights."""

import warnings

import pages


def test_the_first_program_runs(demo_place, capsys):
    program = next(block for block in pages.blocks(pages.ROOT / "README.md") if block.language == "python")
    assert len(program.text.strip().splitlines()) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(program.text, {})
    assert "The capital of France is Paris" in capsys.readouterr().out
