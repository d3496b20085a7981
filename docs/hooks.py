"""Hooks of mkdocs: pages link to files of the repository as GitHub has them, and the list of messages is made from the sources.

What a page links to outside of docs/ joins the site under repository/, at its path; Markdown among it becomes pages, whose links
are followed, too. Each link is then written as it is from page to page, so that a strict build checks it.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LIST = re.compile(r"([-*]|\d+\.) ")
LINK = re.compile(r"(\]\()([^)#\s:]+)(#[^)\s]*)?(\))")
_SPEC = importlib.util.spec_from_file_location("messages", DOCS / "messages.py")  # mkdocs and griffe load this file by its path
messages = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(messages)


class DoctestExamples(griffe.Extension):
    """Docstrings say "Example:"; griffe takes what follows for a program under "Examples:" only."""

    def on_instance(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)


def on_files(files, config):
    pages = [Path(file.abs_src_path) for file in files.documentation_pages()]
    seen = {Path(file.abs_src_path) for file in files}
    while pages:
        for target in _targets(pages.pop()):
            if target not in seen:
                seen.add(target)
                files.append(File.generated(config, _uri(target), abs_src_path=str(target)))
                pages += [target] if target.suffix == ".md" else []
    return files


def on_page_markdown(markdown, page, config, files):
    source = Path(page.file.abs_src_path)
    markdown = _with_blank_lines(LINK.sub(lambda link: _rewritten(source, link), markdown))
    return markdown.replace("<!-- all messages -->", _all_messages())


def _with_blank_lines(markdown: str) -> str:
    """With a blank line before each list that follows a line of text: GitHub needs none there, Python's Markdown does."""
    lines, fenced = [], False
    for line in markdown.splitlines():
        fenced ^= line.startswith("```")
        before = lines[-1] if lines else ""
        if not fenced and LIST.match(line) and before.strip() and not (LIST.match(before) or before.startswith((" ", "#"))):
            lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _targets(page: Path) -> Iterator[Path]:
    """Files outside of docs/ that a page links to."""
    for link in LINK.finditer(page.read_text()):
        target = (page.parent / link.group(2)).resolve()
        if target.is_relative_to(ROOT) and target.is_file() and not target.is_relative_to(DOCS):
            yield target


def _uri(path: Path) -> str:
    """A file's place in the site's source."""
    return (path.relative_to(DOCS) if path.is_relative_to(DOCS) else "repository" / path.relative_to(ROOT)).as_posix()


def _rewritten(source: Path, link: re.Match) -> str:
    target = (source.parent / link.group(2)).resolve()
    if not (target.is_relative_to(ROOT) and target.is_file()):
        return link.group()  # for mkdocs to complain about
    place = PurePosixPath(os.path.relpath(_uri(target), PurePosixPath(_uri(source)).parent))
    return f"{link.group(1)}{place}{link.group(3) or ''}{link.group(4)}"


def _all_messages() -> str:
    """A list per folder of the sources: each message once, with the exception that carries it."""
    groups: dict[str, set[tuple[str, str]]] = {}
    for path, exception, message in messages.raised():
        groups.setdefault(path.parent.relative_to(ROOT).as_posix(), set()).add((message, exception))
    for path, message in messages.native():
        groups.setdefault(path.parent.relative_to(ROOT).as_posix(), set()).add((message, "ValueError or RuntimeError"))
    lines = []
    for folder, found in sorted(groups.items()):
        lines += [f"## {folder}", ""]
        for message, exception in sorted(found):
            lines.append(f"- {_code(message)} ({exception.replace('_', ' ')})")
        lines.append("")
    return "\n".join(lines)


def _code(text: str) -> str:
    """A text as inline code, whatever backticks it has."""
    text = " ".join(text.split())
    fence = "``" if "`" in text else "`"
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"
