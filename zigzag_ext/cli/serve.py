"""`zigzag serve`: a model with a plan behind OpenAI's API."""

import ipaddress
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..planning import env
from ..planning.layers import text_config
from . import arguments
from .app import app, one_line_errors, quiet_transformers
from .progress import load

_GIB = 1024**3


@app.command()
@one_line_errors
def serve(
    model: arguments.Model,
    plan: Annotated[Path | None, typer.Option(help="Plan file; without it every layer keeps every token.")] = None,
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    max_len: Annotated[
        int | None, typer.Option(min=1, help="Most tokens of a request, prompt and answer; default what the model was made for.")
    ] = None,
    max_rows: Annotated[int, typer.Option(min=1, help="Most requests that run at once; rings have memory for all of them.")] = 32,
    memory: Annotated[float, typer.Option(help="For keys and values: a share of the free memory, or bytes.")] = 0.9,
    prefix_cache: Annotated[
        bool, typer.Option("--prefix-cache/--no-prefix-cache", help="Go on where an earlier prompt began alike.")
    ] = True,
    compile: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Run decode steps as compiled graphs; default on a GPU.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Most requests that wait until others have ended.")] = 256,
    kv_format: arguments.KvFormat = None,
    ring_kv_format: arguments.RingKvFormat = None,
    key_smoothing: arguments.KeySmoothing = None,
    chunk: Annotated[
        int | None, typer.Option(min=1, help="Read prompts in chunks of this many tokens, whatever --max-stall-ms says.")
    ] = None,
    max_stall_ms: Annotated[float, typer.Option(help="How long a chunk of a prompt may hold up the others.")] = 50.0,
    api_key: Annotated[str | None, typer.Option(help="Requests have to bring this key; default $ZIGZAG_API_KEY.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Name of the model in requests; default MODEL.")] = None,
    drain_seconds: Annotated[float, typer.Option(min=0.0, help="How long what runs may go on after Ctrl-C or SIGTERM.")] = 30.0,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="A line for each request on standard output.")] = False,
    weights: arguments.Weights = None,
    device: arguments.Device = "auto",
    dtype: arguments.Dtype = "auto",
) -> None:
    """Serve a model with a plan over HTTP, for many requests at once, with OpenAI's API.

    POST /v1/completions and /v1/chat/completions, GET /v1/models, /health and /metrics. Ctrl-C waits for what runs;
    once more, and it is cancelled.
    """
    quiet_transformers()
    from ..serve import Engine
    from ..serve.http import Server, Service, bind
    from .checks import check_options, plans_for

    check_options(device, dtype, None)
    if memory > 1 and memory != int(memory):
        raise ValueError(f"--memory must be a share up to 1 or a whole number of bytes, got {memory}")
    key, formats = api_key or env.read("ZIGZAG_API_KEY"), (kv_format, ring_kv_format, key_smoothing)
    chosen = plans_for(model, {"": plan}, formats)[""]
    max_len = max_len or _context_of(model)
    with bind(host, port) as socket:
        network, tokenizer = load(model, device, dtype, weights=weights)
        engine = Engine(
            network, chosen, max_len=max_len, max_rows=max_rows, memory=memory if memory <= 1 else int(memory), queue=queue,
            max_stall_ms=max_stall_ms, prefix_cache=prefix_cache, compile=compile, prefill_chunk=chunk or "auto",
            tokenizer=tokenizer,
        )  # fmt: skip
        with engine:
            service = Service(engine, served_model_name or model, api_key=key)
            address = socket.getsockname()
            _say(f"{chosen!r}\n{_memory(engine, max_rows)}")
            if key is None and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
                _say("warning: whoever reaches this address may use the model: give --api-key")
            place = f"{f'[{address[0]}]' if ':' in address[0] else address[0]}:{address[1]}"
            ready = f"serving {service.name} at http://{place}/v1 (Ctrl-C ends)"
            server = Server(service, drain_seconds, log_requests, lambda: _say(ready))
            server.run(sockets=[socket])
    if server.error is not None:
        print(f"error: {server.error}", file=sys.stderr)
        raise typer.Exit(1)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _context_of(model: str) -> int:
    """Tokens that the config says."""
    from ..study.loading import load_config

    tokens = getattr(text_config(load_config(model)), "max_position_embeddings", None)
    if not tokens:
        raise ValueError(f"the config of {model} does not say how many tokens it was made for: give --max-len")
    return tokens


def _memory(engine, max_rows: int) -> str:
    stats, most = engine.stats(), engine.most_tokens
    fit = {tokens: engine.capacity(tokens - 1, 1) for tokens in (max(2, most // 8), max(2, most))}
    few = [f"{count} of {tokens:,} tokens" for tokens, count in fit.items() if count < max_rows]
    return (
        f"{stats['budget_bytes'] / _GIB:.2f} GiB for keys and values beside {stats['ring_bytes'] / _GIB:.2f} GiB of rings: "
        f"{max_rows} requests at once, of up to {most:,} tokens" + (f" ({', '.join(few)})" if few else "")
    )
