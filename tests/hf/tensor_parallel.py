"""One process of tensor parallelism: `torchrun --nproc-per-node 2 tensor_parallel.py cpu|cuda FOLDER` compares models
whose heads are shared out (`tp_plan="auto"`) with the same models in one piece, on every process.

What went wrong in a case is written to FOLDER/<case>.<rank>, an empty file where nothing did.
"""

import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_models import new_model, padded_prompt, prompt, windowed_model
from transformers import AutoModelForCausalLM

import zigzag_ext as zz

PLAN = zz.Plan(["streaming", "retrieval"], sink=4, window=16)
QUANTISED = {"kv_format": {"k": "int8", "v": "int4"}, "ring_kv_format": "int8"}
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 200}
MODELS = {
    "llama": lambda: new_model("llama", **SIZES),
    "qwen2": lambda: windowed_model("qwen2", 24, max_window_layers=1, **SIZES),
}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 20}
GENERATED = {  # family, plan, options of enable(), options of generate()
    "greedy": ("llama", PLAN, {}, {}),
    "sampled": ("llama", PLAN, {}, SAMPLED),
    "chunks": ("llama", PLAN, {"prefill_chunk": 32}, {}),
    "quantised": ("llama", PLAN, QUANTISED, {}),
    "windows": ("qwen2", None, {}, {}),
    "windows_sampled": ("qwen2", None, {"prefill_chunk": 32}, SAMPLED),
    "compiled_sampled": ("llama", PLAN, {"compile": True, "prefill_chunk": 32}, SAMPLED),
    "compiled_windows": ("qwen2", None, {"compile": True} | QUANTISED, {}),
}
# Most that logits of the same tokens may differ, of their largest. Where a code is rounded the other way it is by a step.
TOLERANCE = {"cpu": 1e-4, "cuda": 0.05}
QUANTISED_TOLERANCE = {"cpu": 0.03, "cuda": 0.1}


class Models:
    """Each family shared out and in one piece, with the same weights."""

    def __init__(self, device: str, folder: Path):
        self.device, self.folder, self.pairs = device, folder, {}

    def __getitem__(self, family: str):
        if family not in self.pairs:
            folder, dtype = self.folder / family, torch.float32 if self.device == "cpu" else torch.bfloat16
            if dist.get_rank() == 0:
                MODELS[family]().save_pretrained(folder)
            dist.barrier()
            shared = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, tp_plan="auto").eval()
            alone = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(shared.device)
            self.pairs[family] = shared, alone
        return self.pairs[family]


def generated(model, plan, options: dict, how: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """New tokens [batch, 40] of a left-padded batch, and the logits [batch, 40, vocab] that they were chosen from."""
    batch = {name: tensor.to(model.device) for name, tensor in padded_prompt([90, 37]).items()}
    torch.manual_seed(7)
    how = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 40} | how
    with zz.zigzag(model, plan, **options):
        output = model.generate(**batch, **how, output_logits=True, return_dict_in_generate=True)
    return output.sequences[:, batch["input_ids"].shape[1] :], torch.stack(output.logits, 1).float()


def check_generated(models: Models, case: str) -> None:
    """The same tokens as in one piece; where two are within rounding of each other they may part, from there on."""
    family, plan, options, how = GENERATED[case]
    shared, alone = models[family]
    tokens, logits = generated(shared, plan, options, how)
    expected, expected_logits = generated(alone, plan, options | {"compile": False}, how)
    of_ranks = [torch.empty_like(tokens) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, tokens.contiguous())
    assert all(tokens.equal(other) for other in of_ranks), "the processes chose different tokens"
    quantised = "kv_format" in options
    tolerance = (QUANTISED_TOLERANCE if quantised else TOLERANCE)[models.device]
    for row in range(len(tokens)):
        parted = [*(tokens[row] != expected[row]).nonzero().flatten().tolist(), tokens.shape[1] - 1][0]
        scale = expected_logits[row].abs().max()
        error = float((logits[row, : parted + 1] - expected_logits[row, : parted + 1]).abs().max() / scale)
        assert error < tolerance, f"row {row}: the logits before token {parted} differ by {error} of the largest"
        margin = expected_logits[row, parted, expected[row, parted]] - expected_logits[row, parted, tokens[row, parted]]
        assert how or margin <= 2 * tolerance * scale, f"row {row}: token {parted} differs, by a margin of {float(margin)}"
        if models.device == "cpu" and not quantised:
            assert tokens[row].equal(expected[row]), f"row {row}: other tokens from token {parted} on"


def logits_of(model, plan, tokens, kv_heads) -> torch.Tensor:
    """Of a prompt in chunks, then of single tokens, by a process that keeps the keys of `kv_heads`."""
    cache = zz.ZigzagCache(model.config, plan)
    with zz.zigzag(model, plan), torch.no_grad():
        logits = [model(piece, past_key_values=cache).logits for piece in tokens.split([70, 37] + [1] * 20, dim=1)]
    assert cache.layers[0].keys.shape[1] == kv_heads
    return torch.cat(logits, dim=1).float()


def check_logits(models: Models) -> None:
    """Of forwards; each process keeps the keys of its heads."""
    shared, alone = models["llama"]
    tokens = prompt(127).to(shared.device)
    actual, expected = logits_of(shared, PLAN, tokens, 2), logits_of(alone, PLAN, tokens, 4)
    error = float((actual - expected).norm() / expected.norm())
    assert error < (1e-5 if models.device == "cpu" else 0.05), f"relative error of the logits {error}"


def check_heads(models: Models) -> None:
    by_head = zz.Plan([["retrieval", "streaming"] * 2] * 2, sink=4, window=16)
    try:
        logits_of(models["llama"][0], by_head, prompt(127).to(models["llama"][0].device), 2)
    except ValueError as refusal:
        assert "the plan is for 4 KV heads, the keys have 2" in str(refusal)
    else:
        raise AssertionError("a head-level plan of all heads was taken for a part of them")


CHECKS = {"logits": check_logits, "heads": check_heads}
CASES = [*CHECKS, *GENERATED]


def main(device: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(seconds=60))
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    models = Models(device, folder)
    for case in CASES:
        problem = ""
        try:
            if case in CHECKS:
                CHECKS[case](models)
            else:
                check_generated(models, case)
        except Exception:
            problem = traceback.format_exc()
        (folder / f"{case}.{dist.get_rank()}").write_text(problem)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
