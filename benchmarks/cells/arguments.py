"""Arguments of the programs that time whole models."""

import argparse
import re
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


def counts(text: str) -> list[int]:
    return [int(each) for each in names(text)]


def token_count(text: str) -> int:
    """Of "4096" or "32K"; K is 1024."""
    number = re.fullmatch(r"([1-9]\d*)(K?)", text)
    if number is None:
        raise argparse.ArgumentTypeError(f"takes numbers of tokens, such as 4096 or 32K; got {text!r}")
    return int(number[1]) * (1024 if number[2] else 1)


def token_counts(text: str) -> list[int]:
    return [token_count(each) for each in names(text)]


def check_names(parser: argparse.ArgumentParser, given: Collection[str], known: Collection[str]) -> None:
    """Ends the program, with what is known, if one is not."""
    if unknown := [name for name in given if name not in known]:
        parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(dict.fromkeys(known))}")
