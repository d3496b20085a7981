"""Prompt chunks through the backends of torch: every split into past and chunk against the specification, and who is chosen."""

from dataclasses import replace

import pytest
import torch
from gpu import needs_cuda
from op_cases import FLOOR, Case, relative_error, specification, torch_error

import zigzag_ext as zz
from zigzag_ext.attention import backends as prefill_backends
from zigzag_ext.attention import ops, reference
from zigzag_ext.attention import routes as prefill
from zigzag_ext.attention.backends import BACKENDS

NAMES = {"cpu": ["torch_cpu", "joined", "blocks"], "cuda": ["cudnn", "flash", "fa3"]}
PASTS = [0, 1, 16, 100, 1000]


def joined(q, k, v, causal, scale):
    """As flash and fa3: one call over past and chunk, causal towards the last key. Made of the specification."""
    past = k.shape[2] - q.shape[2]
    assert causal
    lengths = torch.full((q.shape[0],), past, dtype=torch.int32)
    return reference.attention(q, k[:, :, past:], v[:, :, past:], k[:, :, :past], v[:, :, :past], lengths, scale=scale)


@pytest.fixture(autouse=True)
def more_backends(monkeypatch):
    """The two other ways of calling a backend, on the CPU: one call for everything, and the past in blocks."""
    monkeypatch.setitem(BACKENDS, "joined", replace(BACKENDS["torch_cpu"], call=joined, bottom_right=True))
    monkeypatch.setitem(BACKENDS, "blocks", replace(BACKENDS["torch_cpu"], plans=True))
    monkeypatch.setattr(prefill, "CHOICES", ("auto", "zigzag", *BACKENDS))
    monkeypatch.setattr(prefill, "PLAN_KEYS", 400)
    monkeypatch.delenv(prefill.ENVIRONMENT, raising=False)
    yield
    prefill_backends.serves.cache_clear()


def backend_or_skip(name: str, case: Case) -> str:
    if name == "fa3":
        pytest.importorskip("fa3_fwd_interface" if case.dtype == torch.bfloat16 else "flash_attn_interface")
    if not prefill_backends.serves(name, torch.device(case.device), case.dtype, case.head_dim):
        pytest.skip(f"{name} does not serve {case.dtype} with head_dim {case.head_dim} here")
    return name


def bundled(inputs: dict) -> dict:
    """The inputs with their caches as one value."""
    caches = [inputs.get(name) for name in ("k_cache", "v_cache", "k_scale", "v_scale")]
    rest = {name: t for name, t in inputs.items() if name not in ("k_cache", "v_cache", "k_scale", "v_scale")}
    return rest | {"caches": ops.KvBuffers(*caches)}


def attend(inputs: dict, case: Case, backend: str, duo_attention=False, known=True) -> torch.Tensor:
    with zz.prefill_options(backend=backend, duo_attention=duo_attention):
        past = case.seq_lens[0] if known else None
        return prefill.attend(**bundled(inputs), past=past, sink=case.sink, window=case.window, scale=case.head_dim**-0.5)


def check(case: Case, name: str) -> None:
    """Output and cache content of one call against the specification, with the tolerance of the op tests."""
    backend_or_skip(name, case)
    inputs = case.build()
    expected, _, expected_k, expected_v = specification(inputs, case)
    allowed = 2 * torch_error(inputs, case, expected) + FLOOR[case.dtype]
    out = attend(inputs, case, name)
    assert out.transpose(1, 2).is_contiguous(), "tokens come before heads in memory"
    error = relative_error(out.cpu(), expected)
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
    for cache, wanted in (("k_cache", expected_k), ("v_cache", expected_v)):
        torch.testing.assert_close(inputs[cache].cpu().double(), wanted, rtol=0, atol=0, equal_nan=True)


def each_backend(function):
    """Runs a test with every backend of the test's device: `name` and `device`."""
    pairs = [
        pytest.param(name, device, marks=needs_cuda if device == "cuda" else (), id=name)
        for device, names in NAMES.items()
        for name in names
    ]
    return pytest.mark.parametrize("name,on", pairs)(function)


def dtypes_of(on: str) -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16] + ([torch.float32] if on == "cpu" else [])


@each_backend
@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("q_len", [17, 64, 129])
def test_past_and_chunk(name, on, past, q_len):
    check(Case((past, past), q_len).on(on, torch.bfloat16), name)


@each_backend
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_group_sizes_and_dtypes(name, on, group, which):
    if which >= len(dtypes_of(on)):
        pytest.skip("no float32 on CUDA")
    check(Case((90,), 70, group=group).on(on, dtypes_of(on)[which]), name)


@each_backend
@pytest.mark.parametrize("head_dim", ops.HEAD_DIMS)
def test_head_dims(name, on, head_dim):
    for dtype in dtypes_of(on)[:2]:
        check(Case((130,), 33, head_dim=head_dim).on(on, dtype), name)


@each_backend
def test_strided_views(name, on):
    check(Case((70, 70, 70), 50, strided=True).on(on, torch.bfloat16), name)


@each_backend
def test_long_past(name, on, monkeypatch):
    monkeypatch.setattr(prefill, "PLAN_KEYS", 8192)
    check(Case((20_000,), 40, num_kv_heads=1).on(on, torch.bfloat16), name)


@each_backend
def test_without_a_cache(name, on):
    case = Case((0,), 40).on(on, torch.bfloat16)
    backend_or_skip(name, case)
    inputs = case.build()
    inputs["k_cache"], inputs["v_cache"] = inputs["k_cache"][:, :, :0], inputs["v_cache"][:, :, :0]
    expected = specification(inputs, case)[0]
    assert relative_error(attend(inputs, case, name).cpu(), expected) <= 2 * FLOOR[torch.bfloat16]


@each_backend
def test_one_call_or_one_per_part(name, on, monkeypatch):
    """joined-style backends get the whole cache at once; others the chunk, then the past, in blocks if shapes are costly."""
    case = Case((100,), 20).on(on, torch.bfloat16)
    backend_or_skip(name, case)
    calls, real = [], BACKENDS[name]
    monkeypatch.setattr(prefill, "PLAN_KEYS", 40)
    monkeypatch.setattr(prefill, "PLAN_LEAST_KEYS", 16)

    def noted(q, k, v, causal, scale):
        assert k.shape[1] == case.num_kv_heads, "keys were repeated for grouped heads"
        calls.append((k.shape[2], causal))
        return real.call(q, k, v, causal, scale)

    monkeypatch.setitem(BACKENDS, name, replace(real, call=noted))
    attend(case.build(), case, name)
    blocks = [(40, False), (40, False), (20, False)] if real.plans else [(100, False)]
    assert calls == ([(120, True)] if real.bottom_right else [(20, True), *blocks])
    for past, expected in ((90, [40, 50]), (40, [40]), (16, [16]), (15, [])):  # a few keys never go alone
        calls.clear()
        attend((short := replace(case, seq_lens=(past,))).build(), short, name)
        assert not real.plans or [kv_len for kv_len, causal in calls if not causal] == expected


def duo_specification(inputs: dict, case: Case) -> torch.Tensor:
    """Chunk tokens see all cached slots and the chunk up to themselves, in float64."""
    wide = {n: t.double() for n, t in inputs.items() if n not in ("seq_lens", "pad")}
    held = min(case.seq_lens[0], case.slots)
    k, v = (torch.cat([wide[f"{n}_cache"][:, :, :held], wide[f"{n}_new"]], 2).repeat_interleave(case.group, 1) for n in "kv")
    scores = wide["q"] @ k.transpose(2, 3) * case.head_dim**-0.5
    future = torch.ones(case.q_len, case.q_len, dtype=torch.bool).triu(1)
    scores[..., held:].masked_fill_(future, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("name", ["zigzag", "torch_cpu"])
@pytest.mark.parametrize("q_len", [2, 17, 90])
@pytest.mark.parametrize("past", [0, 5, 20, 23, 77])
def test_duo_attention_semantics(name, past, q_len):
    """Attends the whole chunk; the ring ends as the exact rule leaves it. Past sink + window tokens the two differ."""
    case = Case((past,), q_len, sink=4, window=16)
    inputs, exact = case.build(), case.build()
    expected = duo_specification(inputs, case)
    out = attend(inputs, case, name, duo_attention=True)
    assert relative_error(out, expected) <= 1e-5
    exact_out = attend(exact, case, name)
    for cache in ("k_cache", "v_cache"):
        assert torch.equal(torch.nan_to_num(inputs[cache]), torch.nan_to_num(exact[cache]))
    assert past + q_len <= 20 or relative_error(exact_out, expected) > 1e-3


def test_duo_attention_leaves_padded_rows_and_decode_steps_right():
    case = Case((0, 0), 40, sink=4, window=16, pad=(0, 13))
    inputs = case.build()
    out = attend(inputs, case, "zigzag", duo_attention=True, known=False)
    alone = Case((0,), 27, sink=4, window=16)
    rest = {n: t[1:, :, 13:] if n in ("q", "k_new", "v_new") else t[1:] for n, t in inputs.items() if n != "pad"} | {"pad": None}
    assert relative_error(out[1:, :, 13:], duo_specification(rest, alone)) <= 1e-5
    assert (out[1, :, :13] == 0).all()
    step = Case((33,), 1, sink=4, window=16)
    assert relative_error(attend(step.build(), step, "auto", duo_attention=True), specification(step.build(), step)[0]) <= 1e-5


@pytest.mark.parametrize(
    "change",
    [{"q_len": 16}, {"seq_lens": (50, 60)}, {"pad": (3,), "seq_lens": (50,)}, {"window": 16}],
    ids=["few_tokens", "ragged", "padded", "streaming"],
)
def test_what_takes_our_kernel_whatever_is_asked(change, monkeypatch):
    calls = []
    monkeypatch.setitem(BACKENDS, "torch_cpu", replace(BACKENDS["torch_cpu"], call=lambda *args: calls.append(args)))
    case = replace(Case((50,), 40), **change)
    inputs = case.build()
    expected = specification(inputs, case)[0]
    out = attend(inputs, case, "torch_cpu", known=len(set(case.seq_lens)) == 1)
    assert not calls and relative_error(out, expected) <= 1e-5


def test_environment_names_the_backend(monkeypatch):
    q, k = torch.zeros(1, 4, 32, 64), torch.zeros(1, 2, 32, 64)
    assert prefill.choose(q, k, 100_000) == "zigzag"
    monkeypatch.setenv(prefill.ENVIRONMENT, "torch_cpu")
    assert prefill.choose(q, k, 0) == "torch_cpu"
    with zz.prefill_options(backend="zigzag"):
        assert prefill.choose(q, k, 0) == "zigzag"
    monkeypatch.setenv(prefill.ENVIRONMENT, "turbo")
    with pytest.raises(ValueError, match="ZIGZAG_PREFILL_BACKEND is 'turbo'; supported: auto, zigzag, cudnn"):
        prefill.choose(q, k, 0)


def test_misuse_raises_before_anything_is_written():
    with pytest.raises(ValueError, match="unknown prefill backend 'xformers'; known: auto"), zz.prefill_options("xformers"):
        pass
    case = Case((10,), 20)
    inputs = case.build()
    before = inputs["k_cache"].clone()
    with pytest.raises(ValueError, match="'flash' serves bfloat16, float16 on cuda.*got float32 on cpu with head_dim 64"):
        attend(inputs, case, "flash")
    with pytest.raises(ValueError, match="a full cache of 33 slots cannot take 20 tokens after 14"):
        prefill.attend(**bundled(inputs), past=14)
    with pytest.raises(RuntimeError, match="has no backward pass"):
        attend(inputs | {"q": inputs["q"].requires_grad_()}, case, "torch_cpu")
    assert torch.equal(before.isnan(), inputs["k_cache"].isnan())


@needs_cuda
def test_cuda_choice_depends_on_the_shape():
    device = torch.device("cuda", torch.cuda.current_device())
    ranked = prefill_backends.ranking(device, torch.bfloat16, 32, 8, 128)
    assert ranked == prefill_backends.ranking(device, torch.bfloat16, 32, 8, 128) and "zigzag" in ranked

    def choose(q_len, past):
        q = torch.empty(1, 32, q_len, 128, dtype=torch.bfloat16, device=device)
        return prefill.choose(q, q[:, :8], past)

    assert choose(16, 100_000) == "zigzag" and choose(64, 400) == "zigzag"
    assert choose(64, 600) == choose(64, 100_000) == ("zigzag" if ops.splits_prompts(device, 128) else "flash")
    assert choose(32_768, 0) == ranked[0]
    assert choose(2048, 0) != "cudnn", "a plan would cost more than it gains"


@pytest.mark.parametrize("pad", [None, (0, 5, 17)], ids=["", "padded"])
@pytest.mark.parametrize("q_len", [17, 40, 64])
def test_slices_through_the_decode_kernel(device, dtype, q_len, pad, monkeypatch):
    case = Case((600, 0, 77), q_len, pad=pad, spare_slots=3).on(device, dtype)
    inputs, route = case.build(), case.build()
    expected, _, expected_k, expected_v = specification(inputs, case)
    allowed = 2 * torch_error(inputs, case, expected) + FLOOR[dtype]
    out = prefill.attend_in_slices(**bundled(inputs), scale=case.head_dim**-0.5)
    assert relative_error(out.cpu(), expected) <= allowed
    for name, wanted in (("k_cache", expected_k), ("v_cache", expected_v)):
        torch.testing.assert_close(inputs[name].cpu().double(), wanted, rtol=0, atol=0, equal_nan=True)
    if device == "cuda" and not ops.splits_prompts(torch.device("cuda", 0), case.head_dim):  # rows of different lengths go there
        monkeypatch.setattr(prefill, "attend_in_slices", lambda *args, **kwargs: "slices")
        assert attend(route, case, "auto", known=False) == "slices"


@needs_cuda
def test_measuring_does_not_touch_the_random_state():
    state = torch.cuda.get_rng_state()
    prefill_backends.ranking.__wrapped__(torch.device("cuda", 0), torch.bfloat16, 8, 2, 64)
    assert torch.equal(state, torch.cuda.get_rng_state())


@needs_cuda
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_memory_does_not_grow_with_the_past(name):
    """The output, its parts and their lse: no repeated keys, no mask."""
    case = Case((40_000,), 256, group=8).on("cuda", torch.bfloat16)
    backend_or_skip(name, case)
    inputs = case.build()
    attend(inputs, case, name)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(inputs, case, name)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 16 * inputs["q"].nbytes < inputs["k_cache"].nbytes
