"""The documents for users: what they tell to run runs as it stands, in order, on the demo's model under its own name."""

import pages
import pytest

from docs import messages

GUIDE = [pages.ROOT / "docs" / "index.md", *sorted((pages.ROOT / "docs" / "guide").glob("*.md"))]
BLOCKS = [block for page in GUIDE for block in pages.blocks(page)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", dict.fromkeys(block.page for block in BLOCKS if block.runs(long=True)), ids=lambda page: page.stem
)
def test_a_page_runs_as_it_stands(page, demo_place, tmp_path, request):
    long = request.config.getoption("--long")
    assert pages.run(page, tmp_path, demo_place, long) == sum(block.runs(long) for block in pages.blocks(page)) > 0


def test_every_block_runs_or_says_why_not():
    fences = sum(page.read_text().count("\n```") for page in GUIDE)
    assert fences == 2 * len(BLOCKS) > 50
    for block in BLOCKS:
        known = block.mark in ("", "long", "output", "serves") or block.mark.startswith("not run: ")
        assert known or (pages.ROOT / block.mark).read_text() == block.text, block.place
        assert block.language in ("python", "bash", "text"), block.place


def test_every_example_stands_on_a_page():
    shown = {block.mark for block in BLOCKS}
    names = {f"examples/{path.name}" for path in (pages.ROOT / "examples").glob("*.py")}
    assert len(names) >= 10 and names <= shown | {"examples/speculation.py"}


def test_quoted_messages_are_in_the_sources():
    page = pages.ROOT / "docs" / "guide" / "troubleshooting.md"
    quoted = pages.quoted_messages(page)
    known = messages.texts()
    assert len(quoted) > 50
    assert not [quote for quote in quoted if not any(quote in text for text in known)]
    assert not [quote for quote in quoted if len(quote.replace(messages.VALUE, "").split()) < 3]


def test_the_list_of_messages_has_those_of_both_languages():
    found = {message for _, _, message in messages.raised()} | {message for _, message in messages.native()}
    assert len(found) > 400
    assert found >= {
        "zigzag attention is not enabled on this model",
        "the cache is full: max_len is … tokens, this forward needs … (… are held); nothing was written. "
        "Make the ZigzagCache with a larger max_len",
        "a thread pool needs at least 1 thread, got …",
        "CUDA error in …: …",
    }


@pytest.mark.parametrize("source, printed, same", [
    ("a 0.51\nb", "a 0.52 \nb\n", True),
    ("a 0.51", "a 0.91", False),
    ("12 tokens", "13 tokens", False),
    ("a", "a\nb", False),
])  # fmt: skip
def test_outputs_are_compared(source, printed, same):
    assert pages.same_output(printed, source) == same
