"""The texts of errors and warnings, read from the sources without running them. Values in a text are shown as "…"."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, NATIVE = ROOT / "zigzag_ext", ROOT / "csrc"
VALUE = "…"
_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
_CALL = re.compile(r"\b(?:ZZ_CHECK|throw Error\(concat|throw Error|throw ::zigzag::Error\(::zigzag::concat|fail)\(")


def texts() -> set[str]:
    """Every text in the Python package, messages among them; every message of the C++ core."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        found |= {_text(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.expr)}
    return (found | {message for _, message in native()}) - {None}


def raised() -> Iterator[tuple[Path, str, str]]:
    """(file, exception, message) of every `raise` and warning of the Python package whose message stands there."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call) or not call.args:
                continue
            name = ast.unparse(call.func)
            message = _text(call.args[0])
            if message and (name == "warnings.warn" or isinstance(node, ast.Raise)):
                yield path, "a warning" if name == "warnings.warn" else name, message


def native() -> Iterator[tuple[Path, str]]:
    """(file, message) of every check and error of the C++ core whose message stands there."""
    for path in sorted(path for path in NATIVE.rglob("*") if path.suffix in {".h", ".cpp", ".cuh", ".cu"}):
        source = path.read_text()
        for call in _CALL.finditer(source):
            arguments = _arguments(source, call.end())
            message = _joined(arguments[1:] if call.group() == "ZZ_CHECK(" else arguments)
            if " " in message.strip(VALUE + " "):
                yield path, message


def _text(node: ast.expr) -> str | None:
    """The text that an expression makes, as far as it stands there; None of what is no text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or VALUE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is right is None else (left or VALUE) + (right or VALUE)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        text = _text(node.func.value)
        return text and re.sub(r"\{\}", VALUE, text)
    return None


def _arguments(source: str, start: int) -> list[str]:
    """The arguments of the call whose parenthesis opens before `start`, as they are written."""
    depth, arguments, at = 1, [""], start
    while depth and at < len(source):
        literal = _STRING.match(source, at)
        piece = literal.group() if literal else source[at]
        depth += (piece in "([{") - (piece in ")]}") if not literal else 0
        if depth == 1 and piece == ",":
            arguments.append("")
        elif depth:
            arguments[-1] += piece
        at += len(piece)
    return arguments


def _joined(arguments: list[str]) -> str:
    """What `concat` makes of arguments: literals as they are, a value for everything else."""
    parts = [argument.strip() for argument in arguments]
    literal = [re.fullmatch(r'(?:"(?:[^"\\\n]|\\.)*"\s*)+', part) for part in parts]
    texts = ["".join(_STRING.findall(part)) if found else VALUE for part, found in zip(parts, literal, strict=True)]
    return "".join(texts).replace('\\"', '"')
