"""Which implementation computes a chunk on a GPU: ranking and choice by shape, with the GPU's part played by stand-ins."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from zigzag_ext.attention import backends as prefill_backends
from zigzag_ext.attention import routes as prefill
from zigzag_ext.attention.backends import BACKENDS, ranking

CPU = torch.device("cpu")


@pytest.fixture
def stand_ins(monkeypatch):
    """cudnn and flash are torch's CPU attention; a run takes as long as `times` says for the name."""
    times = {"zigzag": 3.0, "cudnn": 1.0, "flash": 2.0}
    order = iter(times)
    for name in ("cudnn", "flash"):
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS["torch_cpu"], plans=BACKENDS[name].plans))
    monkeypatch.setattr(prefill_backends, "_TRIAL_TOKENS", 64)
    monkeypatch.setattr(prefill_backends, "_median_milliseconds", lambda run: (run(), times[next(order)])[1])
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    ranking.cache_clear()
    prefill_backends.serves.cache_clear()
    yield monkeypatch
    ranking.cache_clear()
    prefill_backends.serves.cache_clear()


def test_ranking_is_by_time_and_measured_once(stand_ins):
    state = torch.get_rng_state()
    with torch.inference_mode():
        assert ranking(CPU, torch.float32, 8, 2, 64) == ("cudnn", "flash", "zigzag")
        assert ranking(CPU, torch.float32, 8, 2, 64) == ("cudnn", "flash", "zigzag")
    assert torch.equal(torch.get_rng_state(), state), "a seeded generation must not change"


def test_a_backend_that_is_wrong_is_left_out(stand_ins):
    call = BACKENDS["torch_cpu"].call
    stand_ins.setitem(BACKENDS, "cudnn", replace(BACKENDS["cudnn"], call=lambda q, k, v, c, s: call(q, k, v, False, s)))
    stand_ins.setattr(prefill_backends, "_median_milliseconds", lambda run: (run(), 1.0)[1])
    with pytest.warns(
        UserWarning, match="cudnn is not used for torch.float32, head_dim 64: its output differs from this package's"
    ):
        assert ranking(CPU, torch.float32, 4, 4, 64) == ("zigzag", "flash")


def test_a_backend_that_fails_is_left_out(stand_ins):
    def fail(*args):
        raise RuntimeError("no execution plan\nfor this")

    stand_ins.setitem(BACKENDS, "flash", replace(BACKENDS["flash"], call=fail))
    stand_ins.setattr(prefill_backends, "_median_milliseconds", lambda run: (run(), 1.0)[1])
    with pytest.warns(UserWarning, match="flash is not used for torch.float32, head_dim 64: no execution plan$"):
        assert ranking(CPU, torch.float32, 4, 4, 64) == ("zigzag", "cudnn")


def choose(q_len, past, heads=32, quantised=False):
    q = SimpleNamespace(shape=(1, heads, q_len, 128), is_cuda=True, device="cuda:0", dtype=torch.bfloat16)
    return prefill.choose(q, SimpleNamespace(shape=(1, 8, q_len, 128)), past, quantised)


@pytest.mark.parametrize("ranked", [("cudnn", "zigzag", "flash"), ("zigzag", "cudnn"), ("flash", "zigzag")], ids=lambda r: r[0])
@pytest.mark.parametrize("flash", [True, False], ids=["flash", "no_flash"])
@pytest.mark.parametrize("splits", [True, False], ids=["splits", "no_splits"])
def test_choice_by_shape(monkeypatch, ranked, flash, splits):
    monkeypatch.delenv(prefill.ENVIRONMENT, raising=False)
    monkeypatch.setattr(prefill, "ranking", lambda *args: ranked)
    monkeypatch.setattr(prefill, "serves", lambda name, *args: flash)
    monkeypatch.setattr(prefill.ops, "splits_prompts", lambda device, head_dim: splits)
    short = "flash" if flash and not splits else "zigzag"
    assert choose(16, 1 << 20) == choose(17, 0) == choose(64, 512 - 65) == "zigzag"
    assert choose(64, 512 - 64) == choose(17, 1 << 20) == choose(511, 512) == short
    assert choose(64, 1 << 17, quantised=True) == choose(8192, 0, quantised=True) == short
    without_plans = next(name for name in ranked if name != "cudnn")
    assert choose(512, 0) == choose(8192, 0) == without_plans, "too little work for a plan"
    assert choose(16_384, 0) == choose(8192, 131_072) == choose(4096, 32_768) == ranked[0]
    assert choose(16_384, 0, heads=8) == choose(32_768, 5) == without_plans
