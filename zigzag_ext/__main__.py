"""The `zigzag` script and `python -m zigzag_ext`: the command line, or one line saying how to install what it needs."""

import sys


def main() -> None:
    try:
        from .cli.main import app
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("typer", "rich"):
            raise
        sys.exit(f"error: the zigzag command needs {package}: pip install 'zigzag_ext[cli]'")
    app(prog_name="zigzag")


if __name__ == "__main__":
    main()
