"""One process of tensor parallelism: `torchrun --nproc-per-node 2 tensor_parallel.py cpu|cuda FOLDER` compares models
whose heads are shared out (`tp_plan="auto"`) with the same models in one piece, on every process.

What went wrong in a case is written to FOLDER/<case>.<rank>, an empty file where nothing did. Cases behind it are not run.
"""

import gc
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import generate, new_model, padded_prompt, prompt, windowed_model
from transformers import AutoModelForCausalLM
from transformers.generation.stopping_criteria import EosTokenCriteria

import zigzag_ext as zz
from zigzag_ext.hf import chunking
from zigzag_ext.hf.compiled import _Step
from zigzag_ext.hf.session import session_of
from zigzag_ext.study.loading import shared_out

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
            shared = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **shared_out()).eval()
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
    refused("plan is for 4 KV heads, the keys have 2; under tensor parallelism plans of whole layers are served",
            lambda: logits_of(models["llama"][0], by_head, prompt(127).to(models["llama"][0].device), 2))  # fmt: skip


def refused(message: str, call) -> None:
    try:
        call()
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"not refused: {message}")


def gathered(value) -> list:
    """Of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_seeds(models: Models) -> None:
    """Every rank samples what the first one's seed gives."""
    shared, alone = models["llama"]
    ids, found = prompt(40).to(shared.device), []
    for model, seed in ((shared, 5 + dist.get_rank()), (alone, 5)):
        torch.manual_seed(seed)
        with zz.zigzag(model, PLAN):
            found.append(generate(model, 30, ids, **SAMPLED).tolist())
    assert gathered(found[0]) == [found[0]] * dist.get_world_size()
    if models.device == "cpu":
        assert found[0] == found[1]


def check_stopping(models: Models) -> None:
    """A criterion's answer of the first rank is taken: here each rank has another one, as clocks would have."""
    shared, ids = models["llama"][0], prompt(40).to(models["llama"][0].device)
    stops_at = lambda ids, scores, **_: torch.full((len(ids),), ids.shape[1] >= 45 + 3 * dist.get_rank())  # noqa: E731
    with zz.zigzag(shared, PLAN):
        assert gathered(generate(shared, 30, ids, stopping_criteria=[stops_at]).shape[1]) == [5, 5]
        eos = generate(shared, 30, ids)[0, 6].item()  # one of transformers' own stays what it is: rows that ended are padded
        assert generate(shared, 30, ids, stopping_criteria=[EosTokenCriteria(eos)]).shape[1] <= 7
        refused("give stopping_criteria=[MaxTimeCriteria(9.0)]", lambda: generate(shared, 30, ids, max_time=9.0))


def check_chunks_by_memory(models: Models) -> None:
    """Prompts are cut alike where ranks have different free memory."""
    shared, ids = models["llama"][0], prompt(3000).to(models["llama"][0].device)
    free = chunking.free_bytes
    chunking.free_bytes = lambda device: (1 << 22) << 4 * dist.get_rank()
    passes = []
    hook = shared.model.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with zz.zigzag(shared, PLAN):
            generate(shared, 2, ids)
    finally:
        chunking.free_bytes = free
        hook.remove()
    assert len(passes) > 2 and gathered(len(passes)) == [len(passes)] * dist.get_world_size()


def check_speculation(models: Models) -> None:
    """Rounds are those of plain decoding, whatever the clock of each rank says."""
    shared, alone = models["llama"]
    ids = prompt(20).repeat(1, 4).to(shared.device)
    with zz.zigzag(shared, PLAN):
        tokens = generate(shared, 60, ids, custom_generate=zz.speculate("auto"))
    with zz.zigzag(alone, PLAN):
        expected = generate(alone, 60, ids)
    assert gathered(tokens.tolist()) == [tokens.tolist()] * dist.get_world_size()
    if models.device == "cpu":
        assert tokens.equal(expected)


def check_compression(models: Models) -> None:
    """Heads choose what they do in one process, each for itself or all together, for new and for given caches."""
    shared, alone = models["llama"]
    ids, kept = prompt(150).to(shared.device), {}
    for per_head in (True, False):
        method, found = zz.PromptWindows(budget=60, window=4, observe=8, per_head=per_head), []
        for model in (shared, alone):
            with zz.zigzag(model, PLAN, compress=method):
                found.append(generate(model, 20, ids))
            with zz.zigzag(model, PLAN):
                cache = zz.ZigzagCache(model.config, PLAN, compress=method)
                given = generate(model, 20, ids, past_key_values=cache)
                assert given.equal(found[-1]) and len(cache.compressed) == 1
        assert models.device == "cuda" or found[0].equal(found[1])
        kept[per_head] = found[0]
    assert not kept[True].equal(kept[False])


def check_engine(models: Models) -> None:
    refused("shared out over processes (tensor parallelism)", lambda: zz.Engine(models["llama"][0], PLAN, max_len=64, max_rows=2))


class Graph:
    """Stands for a captured graph where there is no GPU: runs its step."""

    def __init__(self, step):
        self.step = step

    def replay(self) -> None:
        self.step.output = self.step._run()


@contextmanager
def captures_counted(model, device: str):
    """Yields what grows with every capture. On a CPU steps are "captured" too: they run once more, as for a graph."""
    counted, own = [], _Step._capture

    def capture(step, beside):
        counted.append(step)
        if device == "cuda":
            return own(step, beside)
        with step.view.states_kept():
            step._run()
        step.graph = Graph(step)

    compiled = session_of(model).compiled
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Step, "_capture", capture)
        if device == "cpu":
            patch.setattr(compiled, "_captures", lambda cache: True)
            patch.setattr(compiled, "_compiled", lambda kind: lambda inputs: compiled.forward(**inputs))
        yield counted


def check_captures(models: Models) -> None:
    """Where one rank has to capture a step again all do, and the tokens stay those of one process."""
    shared, alone = models["llama"]
    rank, ids = dist.get_rank(), prompt(40).to(shared.device)
    with zz.zigzag(alone, PLAN):
        expected = generate(alone, 20, ids)
    with zz.zigzag(shared, PLAN, compile=True, max_len=100), captures_counted(shared, models.device) as counted:

        def captures() -> list[int]:
            """Of each rank, in another generation."""
            before, tokens = len(counted), generate(shared, 20, ids)
            assert models.device == "cuda" or tokens.equal(expected)
            return gathered(len(counted) - before)

        assert captures() == [1, 1]
        assert captures() == [0, 0]
        if rank == 1:
            projection = shared.model.layers[1].self_attn.o_proj
            moved = projection.weight.detach().clone()  # a DTensor, or with older transformers a plain tensor
            projection.weight = torch.nn.Parameter(moved, requires_grad=False)
        assert captures() == [1, 1]
        assert captures() == [0, 0]


def check_memory_of_gone_caches(models: Models) -> None:
    """The memory of a cache that is gone on some ranks only is used again by none of them."""
    shared, ids = models["llama"][0], prompt(40).to(models["llama"][0].device)
    with zz.zigzag(shared, PLAN, compile=True, max_len=100), captures_counted(shared, models.device) as counted:
        session, held, states = session_of(shared), [], []
        for keeping, is_used_again in (([0, 1], False), ([1], False), ([], False), ([], True)):  # by ranks that keep their cache
            cache = session.new_cache()
            assert gathered(any(cache.state is state for state in states)) == [is_used_again] * dist.get_world_size()
            states.append(cache.state)
            generate(shared, 3, ids, past_key_values=cache)
            if dist.get_rank() in keeping:
                held.append(cache)
            del cache
            gc.collect()
        assert gathered(len(counted)) == [3] * dist.get_world_size()


CHECKS = {
    "logits": check_logits,
    "heads": check_heads,
    "seeds": check_seeds,
    "stopping": check_stopping,
    "chunks_by_memory": check_chunks_by_memory,
    "speculation": check_speculation,
    "compression": check_compression,
    "engine": check_engine,
    "captures": check_captures,
    "memory_of_gone_caches": check_memory_of_gone_caches,
    **{case: partial(check_generated, case=case) for case in GENERATED},
}


def main(device: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(seconds=60))
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    models = Models(device, folder)
    failed = None  # the first case that did: the ranks may be out of step behind it, and what they compute says nothing
    for case in CHECKS:
        problem = f"not run: {failed} failed before it" if failed else ""
        try:
            if failed is None:
                CHECKS[case](models)
        except Exception:
            failed, problem = case, traceback.format_exc()
        (folder / f"{case}.{dist.get_rank()}").write_text(problem)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
