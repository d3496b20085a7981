"""The options --compress... of commands: a method of compressing prompts."""

from ..cache.compression import METHODS, PromptCompression

_WINDOW = {"windows": "window", "chunkkv": "chunk"}  # what --compress-window is called in a method


def method_of(budget: str | None, name: str | None, window: int | None, observe: int | None) -> PromptCompression | None:
    """The method that the options ask for; None without --compress. Raises ValueError or TypeError for options that fit none."""
    given = {"--compress-method": name, "--compress-window": window, "--compress-observe": observe}
    if budget is None:
        if lonely := [option for option, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(lonely)} need --compress, how much of a prompt stays")
        return None
    name = name or "windows"
    if name not in METHODS:
        raise ValueError(f"--compress-method must be one of {', '.join(METHODS)}; got {name!r}")
    if window is not None and name not in _WINDOW:
        raise ValueError(f"--compress-window is of {' and '.join(_WINDOW)}; {name} has none")
    options = {"observe": observe, _WINDOW.get(name, "window"): window}
    return METHODS[name](budget=_number(budget), **{option: value for option, value in options.items() if value is not None})


def _number(text: str) -> float | int:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise ValueError(f"--compress takes a share of the prompt such as 0.12, or a number of tokens; got {text!r}")
