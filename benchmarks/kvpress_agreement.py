"""Whether kvpress' ChunkKVPress(SnapKVPress) keeps what zigzag_ext.ChunkKV keeps, on a prompt of the demo model:

    python -m benchmarks.kvpress_agreement --write kept.safetensors       # here: what ours keeps
    python -m benchmarks.kvpress_agreement --compare kept.safetensors     # where kvpress is installed: theirs beside it

kvpress needs an older transformers, so the second command is for an environment of its own: pip install kvpress. It takes the
model from the folder that the first one has converted it into.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# Chunks and the tokens that decide end together, and no pooling: kvpress cuts chunks from the first token to the last.
TOKENS, CHUNK, OBSERVE, SHARE = 1000, 10, 20, 0.25
TOLERANCE = 1e-2  # of a key in float32; another token's key is further away


def write(path: Path) -> None:
    import zigzag_ext as zz
    from zigzag_ext.cli import demo
    from zigzag_ext.hf.cache_argument import cache_argument

    model, tokenizer = demo.load("cpu", "float32")
    [prompt] = demo.passkey_prompts(tokenizer, TOKENS + 100, [0.4], [3])
    ids = tokenizer(prompt.text, return_tensors="pt").input_ids[:, -TOKENS:].contiguous()
    plan = zz.Plan(["retrieval"] * model.config.num_hidden_layers, sink=0, window=1)
    method = zz.ChunkKV(budget=SHARE, observe=OBSERVE, chunk=CHUNK)
    cache = zz.ZigzagCache(model.config, plan, compress=method)
    with torch.no_grad(), zz.zigzag(model, plan):
        model(ids, **cache_argument(model, cache), logits_to_keep=1)
    cache.compress()
    kept = {f"keys.{layer.index}": layer.keys[:, :, : int(TOKENS * SHARE)].contiguous() for layer in cache.layers}
    save_file(kept | {"ids": ids}, path, {"model": str(demo.model_folder())})


def compare(path: Path) -> int:
    from kvpress import ChunkKVPress, SnapKVPress
    from transformers import AutoModelForCausalLM, DynamicCache

    with safe_open(path, "pt") as file:
        ours, folder = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["model"]  # noqa: SIM118
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    press = ChunkKVPress(SnapKVPress(compression_ratio=1 - SHARE, window_size=OBSERVE, kernel_size=1), chunk_length=CHUNK)
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model(ours["ids"], past_key_values=cache, logits_to_keep=1)
    alike = [same(layer.keys, ours[f"keys.{index}"]) for index, layer in enumerate(cache.layers)]
    print(f"{sum(alike)} of {len(alike)} layers keep the same {int(TOKENS * SHARE)} of {TOKENS} tokens")
    return 0 if all(alike) else 1


def same(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() < TOLERANCE)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path, metavar="FILE")
    what.add_argument("--compare", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.compare:
        return compare(args.compare)
    write(args.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
