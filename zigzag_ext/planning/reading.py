"""Reading files that others may have made: sizes are limited before memory is taken, and every error names file and place.

Text and JSON are here, arrays in `arrays`. Every reader raises FileNotFoundError where nothing is, ValueError for content, with
one line that names the file, the place in it (line, byte or field), and what is expected.
"""

import csv
import json
import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MIB = 1 << 20
MAX_TEXT = 4 * MIB  # bytes of a plan, a score table or a cost table: a plan of 200 layers x 128 heads takes a tenth of it
MAX_DEPTH = 64  # of JSON lists and objects within each other; the same as csrc/engine/json.cpp
_SHOWN = 80  # characters of a value in a message


def shown(value) -> str:
    """`value` as `repr` gives it, shortened in the middle: for messages about values of any size."""
    text = repr(value)
    half = _SHOWN // 2
    return text if len(text) <= _SHOWN else f"{text[:half]}...{text[-half:]} ({len(text)} characters)"


def one_line(text: str, limit: int = 1000) -> str:
    """`text` fit for a terminal: one line, control characters as escapes (they could move the cursor), at most `limit` long."""
    text = " ".join(text[: 8 * limit].split())
    text = "".join(repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") else c for c in text)
    return text if len(text) <= limit else f"{text[:limit]}..."


@contextmanager
def located(place: str) -> Iterator[None]:
    """A TypeError or ValueError about the content of a file becomes a ValueError: one line that names the place."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {one_line(str(error))}") from error


def read_bytes(path: str | os.PathLike, what: str, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes. `what` it should be, with an article ("a plan file"), is for messages.

    Raises:
        FileNotFoundError, IsADirectoryError or another OSError: it cannot be read. ValueError: it is larger.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(limit + 1)  # not its size: a pipe or a device has none
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {what.partition(' ')[2]} at {path}") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder, not {what}") from None
    if len(content) > limit:
        raise ValueError(f"{path} is not {what}: it has more than {limit / MIB:g} MiB, the most that is read")
    return content


def read_text(path: str | os.PathLike, what: str, limit: int = MAX_TEXT) -> str:
    """A file's UTF-8 text, without a byte-order mark."""
    return decode(path, what, read_bytes(path, what, limit))


def decode(path: str | os.PathLike, what: str, content: bytes) -> str:
    """The text of what `read_bytes` gave."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "; it looks like UTF-16: save it as UTF-8" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(f"{path} is not {what}: it is not UTF-8 text (byte {error.start}){hint}") from None


def read_json(path: str | os.PathLike, what: str, limit: int = MAX_TEXT) -> Any:
    """The value of a JSON file, see `parse_json`."""
    text = read_text(path, what, limit)
    with located(f"{path} is not {what}: it is not JSON"):
        return parse_json(text)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Numbers may be infinite or NaN, as Python writes them: who reads them checks.

    Raises:
        ValueError: it is not JSON, a key stands twice in an object, or values nest deeper than `MAX_DEPTH`; says where.
    """
    too_deep = f"lists and objects nest deeper than {MAX_DEPTH}"
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(too_deep) from None
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(too_deep)
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item)]
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(f"the key {shown(key)} stands twice in an object")
        members[key] = value
    return members


def parse_csv(path: str | os.PathLike, text: str) -> list[tuple[int, list[str]]]:
    """The rows of a CSV text that have fields, each with the number of its last line."""
    lines = csv.reader(text.splitlines(keepends=True), strict=True)
    rows = []
    try:
        for row in lines:
            rows += [(lines.line_num, row)] if row else []
    except csv.Error as error:
        raise ValueError(f"{Path(path)}:{lines.line_num}: not a line of a CSV file: {error}") from None
    return rows
