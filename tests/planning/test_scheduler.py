"""The compiled module _C: scheduler tables and accounting, limits, build information, and that its stub is complete."""

import ast
from pathlib import Path

import pytest

import zigzag_ext
from zigzag_ext import _C

KINDS = ["retrieval", "streaming", "streaming", "retrieval"]


def scheduler(**changes):
    arguments = {
        "kinds": KINDS,
        "sink": 64,
        "window": 256,
        "num_q_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "dtype": "bfloat16",
    }
    return _C.Scheduler(**{**arguments, **changes})


def test_tables():
    s = scheduler()
    assert s.num_layers == s.launches_per_step == 4
    assert [s.kernel(layer, 1) for layer in range(4)] == ["decode_full", "decode_stream", "decode_stream", "decode_full"]
    assert s.kernel(1, _C.MAX_DECODE_QUERIES) == "decode_stream"
    assert {s.kernel(layer, _C.MAX_DECODE_QUERIES + 1) for layer in range(4)} == {"prefill"}
    assert [s.slots(layer, 8192) for layer in range(4)] == [8192, 320, 320, 8192]
    assert repr(s) == "Scheduler(4 layers: 2 retrieval, 2 streaming; 32 query heads, 8 KV heads, head_dim 128, bfloat16)"


def test_kv_bytes_of_quantised_caches():
    s = scheduler(kv_format=("int8", "int4"), ring_kv_format=("fp8", "none"))
    assert s.kv_bytes(3, 1000, "retrieval") == 2 * 3 * 1000 * 8 * ((128 + 4) + (64 + 4))
    assert s.kv_bytes(3, 1000, "streaming") == 2 * 3 * 320 * 8 * ((128 + 4) + 256)
    assert s.all_retrieval_kv_bytes(3, 1000) == 4 * 3 * 1000 * 8 * 200
    with pytest.raises(ValueError, match='KV format "int2" is not supported; supported: none, fp8, int8, int4'):
        scheduler(kv_format=("int2", "none"))


@pytest.mark.parametrize("dtype, size", [("bfloat16", 2), ("float16", 2), ("float32", 4)])
@pytest.mark.parametrize("batch, max_len", [(1, 1), (1, 131072), (7, 4_000_000)])
def test_kv_bytes(dtype, size, batch, max_len):
    s = scheduler(dtype=dtype)
    token = 2 * 8 * 128 * size  # keys and values of one layer
    assert s.kv_bytes(batch, max_len, "retrieval") == batch * 2 * max_len * token
    assert s.kv_bytes(batch, max_len, kind="streaming") == batch * 2 * 320 * token
    assert s.kv_bytes(batch, max_len) == batch * 2 * (max_len + 320) * token
    assert s.all_retrieval_kv_bytes(batch, max_len) == batch * 4 * max_len * token


def test_mixed_layers():
    kinds = ["streaming", ["streaming", "retrieval", "streaming"], "retrieval"]
    s = scheduler(kinds=kinds, num_q_heads=6, num_kv_heads=3, head_dim=64, rollback=20, ring_kv_format=("int8", "int8"))
    assert s.launches_per_step == 4 and "1 retrieval, 1 streaming, 1 mixed" in repr(s)
    assert s.heads(0) == {"streaming": (0, 1, 2)} and s.heads(1) == {"retrieval": (1,), "streaming": (0, 2)}
    assert (s.slots(1, 5000, "retrieval"), s.slots(1, 5000, "streaming")) == (5000, 340)
    assert s.kernel(1, 1, "streaming") == "decode_stream"
    assert s.kv_bytes(1, 5000, "retrieval") == 5000 * (1 + 3) * 2 * 64 * 2
    assert s.kv_bytes(1, 5000, "streaming") == 340 * (3 + 2) * 2 * (64 + 4)
    for call, message in [
        (lambda: s.slots(1, 5000), "layer 1 is mixed: say which of its caches, by kind"),
        (lambda: s.kernel(0, 1, "retrieval"), "layer 0 has no retrieval cache"),
        (lambda: scheduler(kinds=kinds), "the plan is for layers of 3 KV heads, these have 8"),
        (lambda: scheduler(rollback=-1), "rollback must be >= 0 tokens"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_kv_bytes_of_one_shape():
    assert _C.kv_bytes(100, 8, 128, 2) == 2 * 100 * 8 * 128 * 2
    assert _C.kv_bytes(100, 8, 128, 2, ("fp8", "none"), value_dim=64, batch=3) == 3 * 100 * 8 * (128 + 4 + 64 * 2)
    assert (_C.cache_slots("retrieval", 4, 8, 100), _C.cache_slots("streaming", 4, 8, 100, rollback=5)) == (100, 17)
    with pytest.raises(ValueError, match='the cache has the kind "ring"; supported: retrieval, streaming'):
        _C.cache_slots("ring", 4, 8, 100)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: scheduler(kinds=[]), "at least one layer"),
        (lambda: scheduler(kinds=["ring"]), 'layer 0 has the kind "ring"'),
        (lambda: scheduler(sink=-1), "sink"),
        (lambda: scheduler(window=0), "window"),
        (lambda: scheduler(head_dim=72), "head_dim 72 is not supported; supported: 64, 80, 96, 128, 192, 256, 512"),
        (lambda: scheduler(num_q_heads=30), "30 query heads and 8 KV heads"),
        (lambda: scheduler(num_kv_heads=1), "at most 16 times"),
        (lambda: scheduler(num_kv_heads=0), "0 KV heads"),
        (lambda: scheduler(dtype="float8"), 'dtype "float8" is not supported; supported: float32, float16, bfloat16'),
        (lambda: scheduler().kernel(4, 1), "layer 4 does not exist; the plan has layers 0 to 3"),
        (lambda: scheduler().kernel(0, 0), "q_len must be >= 1, got 0"),
        (lambda: scheduler().slots(-1, 5), "layer -1"),
        (lambda: scheduler().slots(0, -5), "max_len must be >= 0, got -5"),
        (lambda: scheduler().kv_bytes(-1, 5), "batch -1"),
        (lambda: scheduler().kv_bytes(1, 5, "ring"), '"ring"; supported: retrieval, streaming'),
        (lambda: scheduler().kv_bytes(1 << 40, 1 << 40), "2^63"),
    ],
)
def test_errors_are_value_errors(call, message):
    with pytest.raises(ValueError) as raised:
        call()
    assert message in str(raised.value)


def test_limits_and_build_info():
    assert _C.HEAD_DIMS == (64, 80, 96, 128, 192, 256, 512)
    assert (_C.MAX_GROUP_SIZE, _C.MAX_DECODE_QUERIES) == (16, 16)
    assert 1 << 20 < _C.WORKSPACE_BYTES < 16 << 20
    info = _C.build_info()
    assert isinstance(info["cuda"], bool)
    assert bool(info["cuda_archs"]) == info["cuda"]
    assert info["cpu_isa"] in ("baseline", "avx2", "avx512")


def test_stub_lists_what_the_module_has():
    stub = ast.parse((Path(zigzag_ext.__file__).parent / "_C.pyi").read_text())
    bodies = {node.name: node.body for node in stub.body if isinstance(node, ast.ClassDef)}

    def names(body):
        named = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        return named | {node.target.id for node in body if isinstance(node, ast.AnnAssign)}

    def public(thing):
        return {name for name in dir(thing) if not name.startswith("_")}

    assert names(stub.body) - {"BuildInfo", "DecodePlan", "KvFormatInfo"} == public(_C)
    assert names(bodies["BuildInfo"]) == _C.build_info().keys()
    assert all(names(bodies["KvFormatInfo"]) == entry.keys() for entry in _C.formats().values())
    assert names(bodies["DecodePlan"]) == _C.decode_plan("H200", 32, 8, 128, 4096).keys()
    for cls in (_C.Scheduler, _C.Solution):
        assert names(bodies[cls.__name__]) - {"__init__"} == public(cls)
