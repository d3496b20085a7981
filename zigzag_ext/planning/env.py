"""Environment variables that the Python code reads, in one table with one strict parser. The compiled code has its own:
`_C.environment()`. Where a variable is unset or empty, the code decides."""

import os

# name -> supported values (none: any text), meaning
VARIABLES: dict[str, tuple[tuple[str, ...], str]] = {
    "ZIGZAG_API_KEY": ((), "the key of `zigzag serve` where --api-key names none"),
    "ZIGZAG_PREFILL_BACKEND": (
        ("auto", "zigzag", "cudnn", "flash", "fa3", "torch_cpu"),
        "what computes the attention of a prompt where `prefill_options` names nothing; default: auto",
    ),
    "ZIGZAG_TRACEBACK": (("0", "1"), "1: a failing `zigzag` command shows Python's traceback, not one line"),
}


def read(name: str) -> str | None:
    """The value of a variable of the table, None where it is unset or empty.

    Raises:
        ValueError: it has another value than the table supports; the message names the variable, the value and those.
    """
    supported, _ = VARIABLES[name]
    value = os.environ.get(name) or None
    if value is not None and supported and value not in supported:
        raise ValueError(f"{name} is {value!r}; supported: {', '.join(supported)}")
    return value
