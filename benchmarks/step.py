"""Times a decode step of a whole model, in a loop of forwards and in generate():  python benchmarks/step.py --csv step.csv

The model has random weights and the context is faked: the cache is filled with random keys and values and its lengths are set,
because a prefill of 256K tokens would cost minutes and changes nothing about a step's time. Wall time counts the host too, and
waits for the GPU after every token, as generate() does. Implementations run one after another in one process.
"""

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import machine
import torch
import transformers
from duo_recreation import DuoLayer, duo_weights, fake_duo
from records import StepRecord, writer
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, LlamaConfig, Qwen2Config, StaticCache

import zigzag_ext as zz

K = 1024
MARGIN = 256  # tokens a cache can take beyond the context
WARMUP, STEPS, PROFILED = 5, 30, 5
SINK, WINDOW = 64, 256
MODELS = {
    "llama3-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=512 * K, rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ),
    "llama2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=512 * K,
    ),
    "qwen2.5-7b": Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=512 * K, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "tiny": LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    ),
}  # fmt: skip
PLANS = {
    "retrieval_100": 1.0,
    "exclusive_50": 0.5,
    "exclusive_25": 0.25,
    "heads_50": 0.5,
}  # share that retrieves: layers, or KV heads
HEADS_SEED = 0  # of the heads that retrieve


def build_model(name: str, device: str):
    """Random weights, made on the device; bfloat16 on a GPU, float32 on a CPU."""
    config = MODELS[name]
    config.pad_token_id, config.eos_token_id = 0, None
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32).eval()


def even_plan(num_layers: int, share: float) -> zz.Plan:
    """`share` of the layers retrieve, spread evenly over the depth."""
    kinds = ["retrieval" if int((i + 1) * share) > int(i * share) else "streaming" for i in range(num_layers)]
    return zz.Plan(kinds, sink=SINK, window=WINDOW, provenance={"source": "spread evenly, for timing"})


def mixed_plan(num_layers: int, kv_heads: int, share: float) -> zz.Plan:
    """`share` of the KV heads of every layer retrieve, chosen at random: both kinds in one layer, as DuoAttention leaves them."""
    rng = torch.Generator().manual_seed(HEADS_SEED)
    chosen = [torch.randperm(kv_heads, generator=rng)[: round(kv_heads * share)].tolist() for _ in range(num_layers)]
    retrieval = [[head in heads for head in range(kv_heads)] for heads in chosen]
    return zz.Plan.from_heads(retrieval, sink=SINK, window=WINDOW, provenance={"source": "random heads, for timing"})


def make_plan(name: str, config) -> zz.Plan:
    if name.startswith("heads"):
        return mixed_plan(config.num_hidden_layers, config.num_key_value_heads, PLANS[name])
    return even_plan(config.num_hidden_layers, PLANS[name])


def fake_zigzag(model, plan: zz.Plan, context: int) -> zz.ZigzagCache:
    """A ZigzagCache as after a prompt of `context` tokens, of random contents: one real token allocates it."""
    cache = zz.ZigzagCache(model.config, plan, max_len=context + MARGIN)
    model(torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache)
    rows = cache.parts[0]
    rows.columns = rows.longest = context - 1
    cache.begin(1, 1)  # memory for the whole context
    for part in (part for layer in cache.layers for part in layer.parts):
        part.keys.normal_()
        part.values.normal_()
    rows.q_len, rows.columns, rows.longest = 0, context, context
    cache.seq_lens.fill_(context)
    return cache


def fake_dynamic(model, context: int) -> DynamicCache:
    cache, config = DynamicCache(config=model.config), model.config
    shape = (1, config.num_key_value_heads, context, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)), layer)
    return cache


def fake_static(model, context: int) -> StaticCache:
    cache, config = StaticCache(config=model.config, max_cache_len=context + MARGIN), model.config
    cache.early_initialization(1, config.num_key_value_heads, config.head_dim, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(context)
    return cache


class Decoder:
    """Steps of one model with one cache, as generate() makes them."""

    def __init__(self, model, cache, context: int, call):
        self.model, self.cache, self.call, self.held = model, cache, call, context
        self.ids = torch.randint(0, model.config.vocab_size, (1, context + MARGIN), device=model.device)
        self.mask = torch.ones_like(self.ids)

    def step(self) -> None:
        self.held += 1
        ids, mask = self.ids[:, : self.held], self.mask[:, : self.held]
        positions = torch.full((1, 1), self.held - 1, device=ids.device)
        options = {"position_ids": positions, "use_cache": True, "logits_to_keep": 1}
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=1, past_key_values=self.cache, attention_mask=mask, **options
        )
        logits = self.call(**inputs, return_dict=True).logits
        self.ids[:, self.held] = logits[:, -1].float().argmax(-1)
        wait(self.model)

    def generate(self, new_tokens: int) -> float:
        """Seconds that generate() takes to continue what the cache holds."""
        ids, mask = self.ids[:, : self.held + 1], self.mask[:, : self.held + 1]
        start = time.perf_counter()
        self.model.generate(
            ids, attention_mask=mask, past_key_values=self.cache, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None
        )
        wait(self.model)
        self.held += new_tokens
        return time.perf_counter() - start


def wait(model) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def time_steps(decoder: Decoder) -> float:
    """Milliseconds of wall per step."""
    times = []
    for _ in range(WARMUP + STEPS):
        start = time.perf_counter()
        decoder.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARMUP:]) * 1e3


def time_generate(decoder: Decoder) -> float:
    """Milliseconds of wall per token; what a call costs whatever its length drops out of the difference of two."""
    few, many = 4, 4 + STEPS
    decoder.generate(few)
    return statistics.median(decoder.generate(many) - decoder.generate(few) for _ in range(3)) / (many - few) * 1e3


def busy(decoder: Decoder) -> tuple[float, float]:
    """Milliseconds of kernels, and launches, per step on a GPU."""
    if decoder.model.device.type != "cuda":
        return 0.0, 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED):
            decoder.step()
    on_gpu = torch.autograd.DeviceType.CUDA
    events = [e for e in profile.events() if e.device_type == on_gpu and not getattr(e, "is_user_annotation", False)]
    return sum(e.time_range.elapsed_us() for e in events) / PROFILED * 1e-3, len(events) / PROFILED


def measure(decoder: Decoder) -> Iterator[dict]:
    on_gpu = decoder.model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    wall_ms = time_steps(decoder)
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    cache = decoder.cache
    if isinstance(cache.layers[0], DuoLayer):
        kv_bytes = sum(layer.memory_bytes for layer in cache.layers)
    elif isinstance(cache, zz.ZigzagCache):
        kv_bytes = cache.memory_bytes()
        peak += sum(
            part.memory_bytes for layer in cache.layers for part in layer.parts if part.growing
        )  # which torch does not count
    else:
        kv_bytes = sum(b.untyped_storage().nbytes() for layer in cache.layers for b in (layer.keys, layer.values))
    gpu_ms, launches = busy(decoder)
    common = {"gpu_ms": gpu_ms, "launches": launches, "kv_bytes": kv_bytes, "peak_bytes": peak}
    yield {"phase": "step", "wall_ms": wall_ms, **common}
    yield {"phase": "generate", "wall_ms": time_generate(decoder), **common}


IMPLS = ("zigzag_eager", "zigzag_compiled", "transformers_eager", "transformers_compiled", "duo_recreation")


def cells(impl: str, model, plans: list[str], contexts: list[int]) -> Iterator[tuple[str, int, Callable]]:
    """Plan, context and a maker of the decoder for every cell of one implementation, which is on while they are drawn."""
    if impl == "duo_recreation":
        for name in (name for name in plans if name != "retrieval_100"):
            plan = make_plan(name, model.config)
            with duo_weights(model, plan):
                for context in contexts:
                    yield name, context, lambda n=context, plan=plan: Decoder(model, fake_duo(model, plan, n, MARGIN), n, model)
        return
    if not impl.startswith("zigzag"):
        compiled = impl == "transformers_compiled"
        call = model.get_compiled_call(CompileConfig()) if compiled else model
        fake = fake_static if compiled else fake_dynamic
        for context in contexts:
            torch.compiler.reset()  # or the second context is compiled for shapes of any size, which is slower
            yield (
                "full",
                context,
                lambda n=context: Decoder(model, fake(model, n), n, call),
            )
        return
    layers = model.config.num_hidden_layers
    with zz.zigzag(model, even_plan(layers, 1.0), compile=impl == "zigzag_compiled"):
        for name in plans:
            plan = make_plan(name, model.config)
            for context in contexts:
                yield name, context, lambda n=context, plan=plan: Decoder(model, fake_zigzag(model, plan, n), n, model)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    def names(text):
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama3-8b")
    parser.add_argument("--quick", action="store_true", help="4K and 128K tokens, half of the layers streaming: three minutes")
    parser.add_argument("--context", type=names, default=[4 * K, 32 * K, 128 * K, 256 * K], help="tokens, separated by commas")
    parser.add_argument("--plan", type=names, default=list(PLANS), help=f"of {', '.join(PLANS)}")
    parser.add_argument("--impl", type=names, default=list(IMPLS), help=f"of {', '.join(IMPLS)}")
    parser.add_argument("--csv", type=Path, help="file for the results, written anew; name it step*.csv")
    parser.add_argument("--commit", default=machine.commit(), help="name of the measured source")
    args = parser.parse_args(argv)
    if args.quick:
        args.context, args.plan = [4 * K, 128 * K], ["exclusive_50"]
    for given, known in ((args.plan, PLANS), (args.impl, IMPLS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    gpu, driver = machine.processor(args.device), machine.driver(args.device)
    origin = {"commit": args.commit, "gpu": gpu, "driver": driver, "torch": torch.__version__, "model": args.model}
    model, failed = build_model(args.model, args.device), []
    with torch.no_grad(), writer(args.csv, StepRecord) as add:
        for impl in args.impl:
            for plan, context, prepare in cells(impl, model, args.plan, [int(n) for n in args.context]):
                cell = {"plan": plan, "impl": impl, "context": context, "transformers": transformers.__version__}
                try:
                    for row in measure(prepare()):
                        add(StepRecord(**origin, **cell, **row))
                        times = f"{row['wall_ms']:8.2f} ms wall {row['gpu_ms']:8.2f} ms GPU {row['launches']:7.1f} launches"
                        print(f"{impl:22} {plan:14} {context:7} {row['phase']:9} {times}", flush=True)
                except torch.OutOfMemoryError as error:
                    print(f"{impl:22} {plan:14} {context:7} out of memory: {str(error).splitlines()[0]}", flush=True)
                    failed.append(impl)
                gc.collect()
                if args.device == "cuda":
                    torch.cuda.empty_cache()
    return 1 if any(impl.startswith("zigzag") for impl in failed) else 0


if __name__ == "__main__":
    sys.exit(main())
