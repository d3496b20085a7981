"""vLLM in a process of its own: it patches transformers' models where they are loaded, and references are computed elsewhere.

`python engine.py FILE`: FILE has the model folder, options of `vllm.LLM`, and jobs by name, each a list of prompts; results
replace it. The plugin is found by its entry point (`installed.py`). Every job is run by one engine, in order.
"""

import json
import os
import random
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the scheduler can then be looked at

from vllm import LLM, SamplingParams  # noqa: E402

BASE = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32", "block_size": 32, "max_model_len": 1024}


def sampling(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True)


class Watched:
    """An engine whose blocks and preemptions are counted."""

    def __init__(self, model: str, options: dict) -> None:
        self.llm = LLM(model=model, **BASE | options)
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.caches = scheduler.kv_cache_manager
        self.groups = [type(group.kv_cache_spec).__name__ for group in scheduler.kv_cache_config.kv_cache_groups]
        self.most = [0] * len(self.groups)  # blocks that one request held, by group
        self.preempted = 0
        self._watch(scheduler)

    def _watch(self, scheduler) -> None:
        allocate, preempt = self.caches.allocate_slots, scheduler._preempt_request

        def allocated(request, *arguments, **options):
            found = allocate(request, *arguments, **options)
            for group, manager in enumerate(self.caches.coordinator.single_type_managers):
                held = sum(not block.is_null for block in manager.req_to_blocks.get(request.request_id, []))
                self.most[group] = max(self.most[group], held)
            return found

        def preempted(*arguments, **options):
            self.preempted += 1
            return preempt(*arguments, **options)

        self.caches.allocate_slots, scheduler._preempt_request = allocated, preempted

    def free(self) -> int:
        return self.caches.block_pool.get_num_free_blocks()

    def generate(self, prompts: list[list[int]], tokens: int) -> list[dict]:
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling(tokens), use_tqdm=False)
        return [{"tokens": list(each.outputs[0].token_ids), "cached": each.num_cached_tokens} for each in outputs]

    def cancels(self, prompts: list[list[int]], tokens: int) -> list[dict]:
        """Requests that come while others run; each third is cancelled after a number of steps, some before their first."""
        engine, draw, running, ended = self.llm.llm_engine, random.Random(0), {}, 0
        waiting = list(enumerate(prompts))
        while waiting or engine.has_unfinished_requests():
            for _ in range(min(draw.randint(0, 3), len(waiting))):
                index, prompt = waiting.pop()
                engine.add_request(str(index), {"prompt_token_ids": prompt}, sampling(tokens))
                running[str(index)] = draw.randint(0, tokens) if index % 3 == 0 else None
            cancelled = [name for name, steps in running.items() if steps == 0]
            engine.abort_request(cancelled)
            running = {name: steps if steps is None else steps - 1 for name, steps in running.items() if steps != 0}
            done = [output.request_id for output in engine.step() if output.finished]
            ended += len(done)
            running = {name: steps for name, steps in running.items() if name not in done}
        return [{"finished": ended, "cancelled": len(prompts) - ended}]


def main(path: str) -> None:
    with open(path) as file:
        task = json.load(file)
    watched = Watched(task["model"], task["options"])
    before, results = watched.free(), {}
    for name, job in task["jobs"].items():
        if job.get("alone"):
            results[name] = [watched.generate([prompt], job["tokens"])[0] for prompt in job["prompts"]]
        else:
            run = watched.cancels if job.get("cancels") else watched.generate
            results[name] = run(job["prompts"], job["tokens"])
    results |= {"groups": watched.groups, "most": watched.most, "preempted": watched.preempted}
    results["free"] = [before, watched.free()]
    with open(path, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1])
