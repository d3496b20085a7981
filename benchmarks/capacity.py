"""The longest contexts that one GPU decodes: int8 weights, quantised KV.  python -m benchmarks.capacity --csv capacity.csv

The caches are filled with random keys and values by the append op, since a prefill of 4M tokens would take hours; then the
whole model decodes, in a loop of forwards and in generate(). Attention of sampled heads over the whole context is compared
with the specification (zigzag_ext.reference). A run that was interrupted goes on where it stopped.
"""

import argparse
import gc
import sys
import traceback
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from importlib.metadata import version

import torch
import transformers
from torch import Tensor

import zigzag_ext as zz
from zigzag_ext.attention import ops, reference

from .cells.arguments import check_names, model_parser, names, token_count
from .cells.fake_context import fake_zigzag
from .cells.models import MODELS, PLANS, build_model, even_plan
from .cells.quantised_weights import build_quantised
from .report.records import CapacityRecord, held, writer
from .step import Decoder, busy, time_generate, time_steps
from .timing import clock, machine
from .timing.model_memory import kv_bytes, peak_bytes, tensor_bytes, weight_bytes

CELLS = "exclusive_50:4000000,exclusive_25:8000000"
IMPLS = ("zigzag_eager", "zigzag_compiled")
MARGIN = 1024  # tokens that both implementations decode, and more
BLOCK = 65536  # keys that the specification widens to float64 at a time: 64 MiB of a head of 128
QUERY_SIGMA = 2.5  # logits then spread by 2.5: the softmax is neither flat nor one-hot
TOLERANCE_PCT = {torch.bfloat16: 1.0, torch.float32: 0.01}  # rounding of the output and of the probabilities


def attend_in_blocks(q: Tensor, parts: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Softmax attention of q [queries, head_dim], scaled, over all keys and values [keys, head_dim] of `parts`, in float64."""
    out, lse = torch.zeros_like(q), torch.full_like(q[:, :1], -torch.inf)
    for keys, values in parts:
        logits = q @ keys.T
        block_lse = logits.logsumexp(1, keepdim=True)
        total = torch.logaddexp(lse, block_lse)
        out = out * (lse - total).exp() + (logits - total).exp() @ values
        lse = total
    return out


def stored_blocks(layer, head: int, context: int, new: tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values of one KV head in float64: of `context` tokens in blocks, then the new ones [1, heads, 1, head_dim]."""
    kinds = (("keys", "key_scales"), ("values", "value_scales"))
    for start in range(0, context, BLOCK):
        used = slice(start, min(start + BLOCK, context))
        blocks = []
        for codes, scales in kinds:
            block, scale = layer.stores[0].buffers[codes][0, head, used], layer.stores[0].buffers.get(scales)
            blocks.append(block.double() if scale is None else reference.decode(block, scale[0, head, used]))
        yield tuple(blocks)
    yield tuple(reference.stored(x[0, head], layer.stores[0].buffers[codes]) for x, (codes, _) in zip(new, kinds, strict=True))


def head_errors(cache: zz.ZigzagCache, heads: list[int], num_q_heads: int) -> list[float]:
    """Relative errors of the attention op over the whole cache, for `heads` of the first, middle and last retrieval layer.

    Of one new token of random queries, whose keys go to slots past those in use: what is held stays.
    """
    layers = [layer for layer in cache.layers if not layer.window]
    cache.reserve(1)
    context, errors = cache.get_seq_length(), []
    for layer in dict.fromkeys(layers[i] for i in (0, len(layers) // 2, -1)):
        num_kv_heads, head_dim = layer.keys.shape[1], layer.values.shape[3] * (2 if layer.stores[0].kv_format.v == "int4" else 1)
        generator = torch.Generator(layer.device).manual_seed(layer.index)
        q, *new = (
            torch.empty(1, n, 1, head_dim, dtype=layer.dtype, device=layer.device).normal_(0, sigma, generator=generator)
            for n, sigma in ((num_q_heads, QUERY_SIGMA), (num_kv_heads, 1.0), (num_kv_heads, 1.0))
        )
        caches = layer.stores[0].caches
        out, _ = ops.attention(q, *new, *caches[:2], cache.seq_lens, **caches.scales)
        group = num_q_heads // num_kv_heads
        for head in heads:
            queries = slice(head * group, (head + 1) * group)
            expected = attend_in_blocks(q[0, queries, 0].double() * head_dim**-0.5, stored_blocks(layer, head, context, new))
            errors.append(float((out[0, queries, 0] - expected).norm() / expected.norm()))
    return errors


def measure_cell(model, plan: zz.Plan, context: int, impls: list[str], read_gbps: float) -> Iterator[dict]:
    """One row per implementation; all decode from the same cache, one after the other."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with zz.zigzag(model, plan):
        cache = fake_zigzag(model, plan, context, MARGIN)
    weights = weight_bytes(model)
    print(f"filled: {kv_bytes(cache):,} bytes of KV, {weights:,} of weights", flush=True)
    try:
        checked = check(model, cache)
        decoder = Decoder(model, cache, context, model, MARGIN)
        read = weights - tensor_bytes(model.get_input_embeddings().weight) + kv_bytes(cache)
        for impl in impls:
            row = {"impl": impl, "context": context, "read_gbps": read_gbps, "floor_ms": read / read_gbps * 1e-6, **checked}
            with zz.zigzag(model, plan, compile=impl == "zigzag_compiled"):
                row |= decode(decoder)
            free, total = torch.cuda.mem_get_info() if on_gpu else (0, 0)
            row |= {"weight_bytes": weights, "kv_bytes": kv_bytes(cache), "peak_bytes": peak_bytes(model, cache)}
            yield row | {"used_bytes": total - free}
    finally:
        cache.reset()  # whatever compiled code may still refer to, the next cell needs the memory


def check(model, cache: zz.ZigzagCache) -> dict:
    """How many heads were compared with the specification, and the largest error. Raises RuntimeError beyond the tolerance."""
    config, allowed = model.config, TOLERANCE_PCT[model.dtype]
    errors = head_errors(cache, [0, config.num_key_value_heads - 1], config.num_attention_heads)
    print(f"relative errors of sampled heads: {', '.join(f'{error:.1e}' for error in errors)}", flush=True)
    largest = 100 * float(torch.tensor(errors).max())  # NaN if one is
    if not largest <= allowed:
        raise RuntimeError(f"wrong: a relative error of {largest:.2g} %, allowed {allowed} %")
    return {"heads_checked": len(errors), "largest_error_pct": largest}


def decode(decoder: Decoder) -> dict:
    """Times per token, and how many tokens were decoded."""
    before, wall_ms = decoder.held, time_steps(decoder)
    gpu_ms, launches = busy(decoder)
    generate_ms = time_generate(decoder, wall_ms)
    times = {"wall_ms": wall_ms, "generate_ms": generate_ms, "gpu_ms": gpu_ms, "launches": launches}
    return times | {"new_tokens": decoder.held - before}


def build(name: str, weights: str, device: str, most_tokens: int):
    if weights == "plain":
        return build_model(name, device)
    config = deepcopy(MODELS[name])
    config.max_position_embeddings = most_tokens
    return build_quantised(config, weights, device)


def cells(text: str) -> list[tuple[str, int]]:
    return [(name, token_count(tokens)) for name, _, tokens in (cell.partition(":") for cell in names(text))]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = model_parser(__doc__, "capacity")
    parser.add_argument("--weights", choices=("int8", "plain"), default="int8", help="int8 needs torchao")
    parser.add_argument("--kv-format", default="int4", help="of retrieval layers, as Plan.kv_format: int4, int8/int4, ...")
    parser.add_argument("--cell", type=cells, default=CELLS, help=f"plan:tokens, separated by commas; default {CELLS}")
    parser.add_argument("--impl", type=names, default=IMPLS, help=f"of {', '.join(IMPLS)}")
    args = parser.parse_args(argv)
    known_plans = [name for name in PLANS if not name.startswith("heads")]
    for given, known in (([name for name, _ in args.cell], known_plans), (args.impl, IMPLS)):
        check_names(parser, given, known)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    origin = {"commit": args.commit, "gpu": machine.processor(args.device), "driver": machine.driver(args.device)}
    origin |= {"torch": torch.__version__, "transformers": transformers.__version__, "model": args.model}
    origin |= {"torchao": version("torchao") if args.weights == "int8" else "-", "weights": args.weights}
    origin |= {"kv_format": args.kv_format}
    done = {(row.plan, row.context, row.impl) for row in held(args.csv, CapacityRecord, origin)}
    failed, read_gbps = [], clock.read_bandwidth(args.device)
    model = build(args.model, args.weights, args.device, max(tokens for _, tokens in args.cell) + MARGIN)
    with torch.no_grad(), writer(args.csv, CapacityRecord, go_on=True) as add:
        for name, context in args.cell:
            cell = f"{name} {args.kv_format} {context:,}"
            impls = [impl for impl in args.impl if (name, context, impl) not in done]
            if not impls:
                print(f"{cell}: in {args.csv} already")
                continue
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
            plan = replace(even_plan(model.config.num_hidden_layers, PLANS[name]), kv_format=args.kv_format)
            try:
                for row in measure_cell(model, plan, context, impls, read_gbps):
                    add(CapacityRecord(**origin, plan=name, **row))
                    times = (
                        f"{row['wall_ms']:.2f} ms a token, {row['generate_ms']:.2f} in generate(), floor {row['floor_ms']:.2f}"
                    )
                    print(f"{cell} {row['impl']}: {times}, GPU {row['gpu_ms']:.2f}; {row['used_bytes']:,} bytes used", flush=True)
            except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
                failed.append(f"{cell}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                traceback.print_exc()
    print("".join(f"{line}\n" for line in failed), end="", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
