"""Many generate() calls in one process: memory, mappings, threads and open files stay as they are."""

import processes

PROGRAM = """
import contextlib, gc, os
import torch
import zigzag_ext as zz
from tiny_models import generate, new_model, padded_prompt, prompt

torch.set_num_threads(1)
calls = int({calls})
plan = zz.Plan(["streaming", "retrieval"], sink=4, window=16)
model = new_model("llama", hidden_size=64, intermediate_size=64, num_hidden_layers=2)
zz.enable(model, plan, rollback=10, prefill_chunk=16)

def kept(turns=3):
    cache, ids = zz.ZigzagCache(model.config, plan, rollback=10), prompt(20)
    for turn in range(turns):
        ids = torch.cat([ids, generate(model, 2, ids, past_key_values=cache), prompt(3, seed=turn)], 1)
    cache.reset()
    generate(model, 2, ids, past_key_values=cache)

def failing():
    with contextlib.suppress(IndexError), torch.no_grad():
        model(prompt(40), logits_to_keep=torch.tensor([40]))

lookup = {{"prompt_lookup_num_tokens": 3, "eos_token_id": 10**6}}  # of no vocabulary; transformers 5.4 needs one
ways = [
    lambda n: generate(model, 2, prompt(5 + n % 50)),
    lambda n: generate(model, 2, **padded_prompt([9, 5, 30])),
    lambda n: generate(model, 2, prompt(12), num_beams=3),
    lambda n: kept(),
    lambda n: failing(),
    lambda n: generate(model, 3, prompt(6).repeat(1, 3), **lookup),
    lambda n: generate(model, 2, prompt(600)),
]

def state():
    gc.collect()
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    with open("/proc/self/maps") as file:
        maps = sum(1 for _ in file)
    return int(status["VmRSS"].split()[0]), maps, int(status["Threads"]), len(os.listdir("/proc/self/fd"))

for n in range(calls):
    ways[n % len(ways)](n)
    if n == max(calls // 10, 5 * len(ways)):
        print(*state())
print(*state())
"""


def test_generate_leaves_nothing_behind(request, record_property):
    calls = 10_000 if request.config.getoption("--long") else 200
    output = processes.run(PROGRAM.format(calls=calls), timeout=1800)
    early, late = ([int(number) for number in line.split()] for line in output.splitlines())
    record_property("count of generate() calls", calls)
    print("KiB of memory, mappings, threads, open files:", early, "then", late)
    assert late[0] - early[0] < 16 << 10 and late[1] - early[1] < 20
    assert late[2:] == early[2:]
