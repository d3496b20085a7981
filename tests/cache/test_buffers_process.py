"""What could end the process, in a process of its own: reading what has no memory, threads, interrupts, limits, many caches."""

from pathlib import Path

import processes
import pytest

PREAMBLE = """
import copy, gc, io, pickle, resource, sys, threading
import torch
from zigzag_ext.attention.buffers import GrowingBuffer
def growing(max_slots=1 << 17, batch=2):
    return GrowingBuffer(batch, 2, max_slots, 64, torch.float32, "cpu")
"""


def run(program: str) -> str:
    return processes.run(program, PREAMBLE)


def test_whatever_reads_a_cache_reads_what_it_holds():
    """Of a cache that is in use, and of what was taken from it before it was emptied and deleted."""
    output = run("""
        import zigzag_ext as zz
        from transformers import LlamaConfig
        config = LlamaConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_hidden_layers=2)
        cache = zz.ZigzagCache(config, zz.Plan(["streaming", "retrieval"], sink=4, window=16))
        with cache.forward(1, 1):
            for layer in cache.layers:
                layer.attend(torch.randn(1, 4, 1, 64), torch.ones(1, 2, 1, 64), torch.ones(1, 2, 1, 64), None)
        def saved(value):
            file = io.BytesIO()
            torch.save(value, file)
            assert file.tell() < 4 << 20, file.tell()
        store = layer.stores[0]
        shown, whole, buffer = layer.keys, store.buffers["keys"], store.growing["keys"]
        for state in ("used", "empty", "deleted"):
            uses = saved, pickle.dumps, copy.deepcopy, repr, str, torch.sum, torch.Tensor.tolist, torch.Tensor.share_memory_
            for use in uses:
                print(state, use, flush=True)
                use(shown)
            print(state, "holders", flush=True)
            repr(vars(buffer)), repr(whole), repr(locals()), layer and repr(vars(layer))
            copy.deepcopy(layer), copy.deepcopy(buffer), saved(buffer)
            assert whole[:, :, ::4096].any() == (state == "used"), "what was given back reads as zeros"
            assert shown[:, :, 0].eq(1).all(), "a copy stays"
            if state == "used":
                cache.reset()
            else:
                cache = layer = None
                gc.collect()
        print("end")
    """)
    assert output.endswith("end\n")


def test_several_threads_grow_copy_and_release_one_buffer():
    run("""
        buffer, errors = growing(4096), []
        def work(number):
            try:
                for turn in range(300):
                    buffer.commit((turn * 37 + number) % 4096)
                    buffer.commit_row(number % 2, 4096)
                    buffer.held()
                    buffer.growth_bytes(4096)
                    if turn % 7 == number % 7:
                        buffer.release()
                    if turn % 50 == number:
                        buffer.extend(buffer.max_slots + 4096)
            except Exception as error:
                errors.append(error)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert not errors, errors
        buffer.commit(100)
        buffer.tensor[:, :, :100] = 1
        assert buffer.held(100).eq(1).all()
        buffer.release()
        assert buffer.memory_bytes == 0
    """)


INTERRUPTS = """
from zigzag_ext.attention import buffers
calls = {
    "commit": lambda b: b.commit(900), "commit_row": lambda b: b.commit_row(1, 900), "release": lambda b: b.release(),
    "release_row": lambda b: b.release_row(0), "shrink": lambda b: b.shrink(10), "extend": lambda b: b.extend(1 << 16),
    "held": lambda b: b.held(), "deepcopy": copy.deepcopy,
}
total = 0
for name, call in calls.items():
    for line in range(1, 1000):
        buffer = growing(1000)
        buffer.commit(300)
        values = torch.randn(2, 2, 300, 64)
        buffer.tensor[:, :, :300] = values
        left = line
        def trace(frame, event, arg):
            global left
            if frame.f_code.co_filename != buffers.__file__:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace
        interrupted = False
        try:
            sys.settrace(trace)
            call(buffer)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.settrace(None)
        for row, slots in enumerate(buffer.row_slots):
            kept = min(slots, 300)
            assert buffer.held(row=row)[:, :, :kept].equal(values[row : row + 1, :, :kept]), (name, line)
            buffer.tensor[row, :, :slots] = 1
        before = buffer.tensor.data_ptr()
        buffer.commit(950)
        buffer.tensor[:, :, :950] = 2
        assert buffer.held().eq(2).all() and buffer.tensor.data_ptr() == before, (name, line)
        buffer.release()
        assert buffer.memory_bytes == 0 and buffer.slots == 0, (name, line)
        if not interrupted:
            break
        total += 1
    else:
        raise AssertionError("the call never ended")
print(total)
"""


def test_an_interrupt_at_any_line_leaves_a_buffer_that_can_be_used():
    """A trace function raises at the k-th line of a call, for every k: what counts as held has memory and its contents."""
    assert int(run(INTERRUPTS)) > 60


def test_limits_of_the_process_are_named():
    """Under a limit of addresses (ulimit -v) a buffer of the size that is asked for works."""
    run("""
        used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) << 10
        resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), resource.RLIM_INFINITY))
        buffers = [growing(1 << 17, batch=1) for _ in range(8)]  # 64 MiB each
        for buffer in buffers:
            buffer.commit(10)
            buffer.tensor[:, :, :10] = 1
        try:
            growing(1 << 31)
        except MemoryError as error:
            assert "cannot reserve" in str(error) and "RLIMIT_AS (ulimit -v)" in str(error), error
        else:
            raise AssertionError("no error")
        try:
            buffers[0].extend(1 << 31)
        except MemoryError as error:
            assert "RLIMIT_AS" in str(error) and buffers[0].held().eq(1).all()
        else:
            raise AssertionError("no error")
    """)


@pytest.mark.parametrize("batch", [1, 4])
def test_two_hundred_caches_of_32_layers_live_at_once(batch):
    """12,800 buffers for 131,072 tokens of 8 KV heads x 128 in bfloat16: addresses and mappings of the process suffice."""
    output = run(f"""
        buffers = [GrowingBuffer({batch}, 8, 131072, 128, torch.bfloat16, "cpu") for _ in range(200 * 32 * 2)]
        for buffer in buffers:
            for row in range({batch}):
                buffer.commit_row(row, 2)
                buffer.tensor[row, :, :2] = 1
        print(sum(1 for _ in open("/proc/self/maps")))
        for buffer in buffers[::7]:
            buffer.release_row({batch} - 1)
            assert not buffer.tensor[{batch} - 1, :, :9].any()
            buffer.commit(3)
            buffer.release()
        del buffers, buffer
        gc.collect()
        print(sum(1 for _ in open("/proc/self/maps")))
    """)
    live, after = map(int, output.split())
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    assert live < 0.8 * most and after < 5_000
