"""The README's first program, as it stands but for the name of the model, which is the demo's copy of the same weights."""

import re
import warnings
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_first_program_runs(demo_model, capsys):
    program = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    lines = program.strip().splitlines()
    assert len(lines) == 8
    folder = demo_model[0].config._name_or_path
    program, changed = re.subn(r'"HuggingFaceTB/SmolLM2-135M-Instruct"', repr(folder), program)
    assert changed == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        exec(program, {})
    assert "The capital of France is Paris" in capsys.readouterr().out
