"""Whole caches in a process of their own: copies and files of them, threads, real interrupts, limits, many at once."""

import processes
import pytest

PREAMBLE = """
import copy, gc, io, pickle, random, resource, signal, threading, time
import torch
from transformers import LlamaConfig
import zigzag_ext as zz
torch.set_num_threads(1)
def config(layers):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return LlamaConfig(hidden_size=256, num_hidden_layers=layers, max_position_embeddings=1 << 17, **heads)
def new_cache(layers=4, **options):
    plan = zz.Plan(["streaming", "retrieval"] * (layers // 2), sink=4, window=16, **options.pop("plan", {}))
    return zz.ZigzagCache(config(layers), plan, **options)
def attend(cache, tokens=1, batch=1, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, h, tokens, 64, generator=rng) for h in (4, 2, 2))
    with cache.forward(batch, tokens, ids=torch.full((batch, tokens), seed % 100)):
        return [layer.attend(q, k, v, None) for layer in cache.layers]
"""


def run(program: str) -> str:
    return processes.run(program, PREAMBLE)


def test_a_cache_is_copied_and_saved_with_what_it_holds():
    """By every way that takes an object apart; the copies go on where it stopped, and so does it."""
    output = run("""
        def saved(value):
            file = io.BytesIO()
            torch.save(value, file)
            assert file.tell() < 16 << 20, file.tell()
            file.seek(0)
            return torch.load(file, weights_only=False)
        ways = {
            "deepcopy": copy.deepcopy, "pickle": lambda c: pickle.loads(pickle.dumps(c)), "torch.save": saved,
            "twice": lambda c: copy.deepcopy(pickle.loads(pickle.dumps(c))),
        }
        for plan in ({}, {"kv_format": "int8", "key_smoothing": True}, {"kv_format": "fp8", "ring_kv_format": "int4"}):
            for name, way in ways.items():
                if "fp8" in plan.values() and name in ("pickle", "twice"):
                    continue  # torch saves tensors of this dtype, but cannot unpickle them
                for tokens in (0, 1, 30, 700):
                    cache = new_cache(plan=plan)
                    if tokens:
                        attend(cache, tokens)
                    other = way(cache)
                    repr(cache), repr(vars(cache)), str(cache.layers), [repr(vars(each)) for each in cache.stores]
                    for seed in (1, 2, 3):
                        found, expected = attend(other, seed=seed), attend(cache, seed=seed)
                        assert all(a.equal(b) for a, b in zip(found, expected)), (plan, name, tokens)
                    cache.reset()
                    assert other.get_seq_length() == tokens + 3 and cache.get_seq_length() == 0
        print("end")
    """)
    assert output.endswith("end\n")


def test_one_cache_is_reset_and_used_by_several_threads():
    """No thread's forward is right while others empty the cache, but none ends the process, and afterwards it is as new."""
    run("""
        cache, unknown = new_cache(), []
        def work(number):
            for turn in range(60):
                try:
                    if (turn + number) % 3:
                        cache.reset()
                    else:
                        attend(cache, tokens=1 + (turn * 7) % 300, seed=turn)
                except Exception as error:
                    words = str(error).lower()
                    if type(error) not in (RuntimeError, ValueError) or not ("cache" in words or "layer" in words):
                        unknown.append(repr(error))
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not unknown, unknown
        cache.reset()
        fresh = new_cache()
        for seed, tokens in enumerate((40, 1, 1)):
            assert all(a.equal(b) for a, b in zip(attend(cache, tokens, seed=seed), attend(fresh, tokens, seed=seed)))
    """)


def test_a_signal_at_any_time():
    """A timer's signal in the place of Ctrl-C, in forwards, growth, reset and row changes."""
    output = run("""
        def stop(*args):
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, stop)
        rng, marked, stopped = random.Random(0), 0, 0
        uses = {
            "step": lambda c: attend(c, seed=5), "prompt": lambda c: attend(c, 600, seed=6), "reset": lambda c: c.reset(),
            "crop": lambda c: c.crop(-2), "reorder": lambda c: c.reorder_cache(torch.tensor([0])),
            "select": lambda c: c.batch_select_indices(torch.tensor([0])), "copy": lambda c: copy.deepcopy(c),
        }
        after = {}
        start = new_cache(rollback=4)
        attend(start, 250, seed=1)
        for name, use in uses.items():
            done = copy.deepcopy(start)
            begin = time.perf_counter()
            use(done)
            duration = time.perf_counter() - begin
            for turn in range(20):
                cache = copy.deepcopy(start)
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 + duration * rng.random())
                    use(cache)
                    time.sleep(0.2)
                except KeyboardInterrupt:
                    stopped += 1
                try:
                    found = attend(cache, seed=9)
                except RuntimeError as error:
                    assert "call reset()" in str(error), error
                    marked += 1
                    cache.reset()
                    found, expected = attend(cache, seed=9), [attend(new_cache(), seed=9)]
                else:
                    expected = [attend(copy.deepcopy(each), seed=9) for each in (start, done)]
                assert any(all(map(torch.equal, found, each)) for each in expected), (name, turn)
        print(stopped, marked)
    """)
    stopped, marked = map(int, output.split())
    assert stopped == 7 * 20 and marked < stopped


def test_a_limit_of_addresses_is_named_and_a_smaller_cache_works():
    run("""
        used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), resource.RLIM_INFINITY))
        cache = new_cache(32)
        try:
            attend(cache)
        except MemoryError as error:
            assert "RLIMIT_AS (ulimit -v)" in str(error), error
        else:
            raise AssertionError("no error")
        assert cache.get_seq_length() == 0
        small, fresh = new_cache(32, max_len=1000), new_cache(32, max_len=1000)
        attend(small, 30)
        small.reset()
        assert all(map(torch.equal, attend(small, 30), attend(fresh, 30)))
    """)


@pytest.mark.parametrize("batch", [1, 2])
def test_two_hundred_caches_of_32_layers_are_used_at_once(batch):
    run(f"""
        caches = [new_cache(32) for _ in range(200)]
        for cache in caches:
            attend(cache, batch={batch})
        expected = attend(copy.deepcopy(caches[7]), batch={batch}, seed=3)
        for cache in caches:
            assert all(map(torch.equal, attend(cache, batch={batch}, seed=3), expected))
        for cache in caches[::2]:
            cache.reset()
        del caches, cache
        gc.collect()
        assert sum(1 for _ in open("/proc/self/maps")) < 3000
    """)
