"""What the reports share: Markdown tables, and the places in documents where they go."""

from pathlib import Path


def table(header: list[str], lines: list[list[str]], text_columns: int = 1) -> str:
    """The first columns are text, the others are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def markers(name: str) -> tuple[str, str]:
    return f"<!-- results:{name} -->", f"<!-- /results:{name} -->"


def insert(target: Path, name: str, text: str) -> bool:
    """Replaces what stands between the markers of `name`. False if the file or its markers do not exist."""
    if not target.exists():
        return False
    opening, closing = markers(name)
    before, begin, rest = target.read_text().partition(opening)
    _, end, after = rest.partition(closing)
    if not (begin and end):
        return False
    target.write_text(f"{before}{opening}\n{text}\n{closing}{after}")
    return True
