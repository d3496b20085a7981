"""The app that the commands of `commands.py` and `study.py` join. Heavy imports stand in commands, so that `--help` is quick."""

import functools
import io
import logging
import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from .. import __version__
from ..planning import env
from ..planning.reading import one_line
from .progress import want

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Long-context text generation where only some layers keep the whole context.\n\n"
        "A RETRIEVAL layer keeps every token in its KV cache. A STREAMING layer keeps the first few tokens (the sink) and the "
        "last few (the window), so its memory and time stay constant. A PLAN is a small JSON file: the kind of every layer.\n\n"
        "Start with `zigzag demo`. `zigzag plans` has plans for known models. For others, get head scores with `zigzag identify` "
        "and a plan from them with `zigzag solve`. Measure the plan with `zigzag eval`, use it with `zigzag generate`."
    ),
)
# A long path stays one line, whatever the width of the terminal, and what a file's name or content says is never markup.
console = Console(soft_wrap=True, markup=False, emoji=False)


def one_line_errors(command):
    """Expected failures (bad input, missing files or packages, full memory or disk) become one line on stderr and exit code 2."""

    @functools.wraps(command)
    def wrapper(*args, **kwargs):
        traceback = False
        try:
            traceback = env.read("ZIGZAG_TRACEBACK") == "1"
            return command(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of a pipe has gone: typer ends quietly
        except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError, ArithmeticError) as error:
            if traceback:
                raise
            print(f"error: {one_line(str(error), 2000) or type(error).__name__}", file=sys.stderr)
            raise typer.Exit(2) from None

    return wrapper


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"zigzag_ext {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No lines about what takes long; without a terminal there are none.")
    ] = False,
) -> None:
    want(not quiet)
    for stream in (sys.stdout, sys.stderr):  # a name or text that the terminal's encoding lacks is shown escaped
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def quiet_transformers() -> None:
    """Keeps notes and loading bars of transformers, and of what it imports where installed, off the screen; errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("transformers", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
