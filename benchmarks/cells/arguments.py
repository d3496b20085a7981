"""Arguments of the programs that time whole models."""

import argparse
from collections.abc import Collection
from pathlib import Path

import torch

from ..timing import machine
from .models import MODELS


def model_parser(doc: str | None, kind: str) -> argparse.ArgumentParser:
    """With --device, --model, --csv and --commit. kind: how the names of its results begin."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama3-8b")
    parser.add_argument("--csv", type=Path, help=f"file for the results, to which rows are added; name it {kind}*.csv")
    parser.add_argument("--commit", default=machine.commit(), help="name of the measured source")
    return parser


def names(text: str) -> list[str]:
    return text.split(",")


def check_names(parser: argparse.ArgumentParser, given: Collection[str], known: Collection[str]) -> None:
    """Ends the program, with what is known, if one is not."""
    if unknown := [name for name in given if name not in known]:
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(dict.fromkeys(known))}")
