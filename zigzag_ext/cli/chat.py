"""`zigzag chat`: a conversation on one cache; each turn reads only what is new."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from . import arguments
from .app import app, one_line_errors, quiet_transformers
from .progress import load, show


@app.command()
@one_line_errors
def chat(
    model: arguments.Model,
    plan: Annotated[Path | None, typer.Option(help="Plan file; without it every layer keeps every token.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens of an answer.")] = 512,
    kv_format: arguments.KvFormat = None,
    ring_kv_format: arguments.RingKvFormat = None,
    key_smoothing: arguments.KeySmoothing = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token; above: sampling.")] = 0.0,
    compile: Annotated[bool, typer.Option("--compile", help="Run decode steps as one compiled graph.")] = False,
    weights: arguments.Weights = None,
    device: arguments.Device = "auto",
    device_map: arguments.DeviceMap = None,
    dtype: arguments.Dtype = "auto",
) -> None:
    """Talk to a model with a plan. Lines are questions; /reset begins anew, /exit or the end of input ends.

    Ctrl-C ends an answer that is under way; that question and its answer are then forgotten.
    """
    quiet_transformers()
    from ..hf import zigzag
    from .checks import check_options, plans_for
    from .conversation import Conversation

    check_options(device, dtype, device_map)
    chosen = plans_for(model, {"": plan}, (kv_format, ring_kv_format, key_smoothing))[""]
    network, tokenizer = load(model, device, dtype, device_map, weights=weights)
    options = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with zigzag(network, chosen, compile=compile):
        talk = Conversation(network, tokenizer, chosen, system, max_new_tokens=max_new_tokens, **options)
        print("/reset begins anew, /exit ends", file=sys.stderr)
        while (line := _ask()) not in (None, "/exit"):
            if line == "/reset":
                talk.reset()
            elif line.startswith("/"):
                print(f"unknown command {line.split()[0]!r}: /reset, /exit", file=sys.stderr)
            elif line:
                said = talk.say(line, show)
                show("\n")
                print(f"({said})", file=sys.stderr)


def _ask() -> str | None:
    """The next line, None at the end of input."""
    print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None
