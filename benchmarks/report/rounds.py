"""The table of speculative decoding (speculate*.csv). Called by __main__.py."""

from .documents import table
from .records import SpeculateRecord
from .steps import PLANS, tokens

WORK = {
    "round": "rounds",
    "verify": "a forward of several tokens",
    "draft": "a draft step",
    "generate": "plain generate()",
    "continuation": "continuing text",
    "quotes": "quoting",
    "code_edit": "editing code",
}


def table_of(rows: list[SpeculateRecord]) -> str:
    """Every row, with its speed-up over plain rounds, or plain generate(), of the same work, context and batch."""
    plain = {}
    for row in rows:
        if row.draft == "off" or row.phase == "generate":
            plain[_place(row)] = row.ms_per_token  # "off" comes after generate() and is the same loop
    lines = []
    for row in rows:
        base = plain.get(_place(row))
        emits = row.rounds > 0 or row.phase == "generate"
        names = [row.model, PLANS.get(row.plan, row.plan), WORK.get(row.phase, row.phase), row.draft]
        numbers = [tokens(row.context), str(row.batch), str(row.tokens), f"{row.acceptance:.2f}" if row.rounds else "–"]
        numbers += [str(row.rounds) if row.rounds else "–", f"{row.wall_ms:.2f}"]
        numbers += [f"{row.ms_per_token:.2f}", f"{base / row.ms_per_token:.2f}x"] if emits and base else ["–", "–"]
        lines.append([*names, *numbers])
    header = ["model", "plan", "work", "draft", "context", "batch", "tokens", "kept", "rounds", "ms", "ms per token", "speed-up"]
    return table(header, lines, 4)


def _place(row: SpeculateRecord) -> tuple:
    work = "round" if row.phase == "generate" else row.phase
    return (row.gpu, row.model, row.impl, row.plan, row.context, row.batch, work)
