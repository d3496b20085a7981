"""Attention of other libraries that returns its log-sum-exp, behind one signature, and their ranking by measurement."""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from . import ops

_aten = torch.ops.aten
_TRIAL_TOKENS = 4096  # causal; long enough that launches do not count, short enough to take a millisecond on an H100
_TRIALS = 5
_SAMPLE_TOKENS = 128
_TOLERANCE = 2e-2  # relative, over the whole output; rounding to bfloat16 gives 3e-3
_FA3_MODULES = ("flash_attn_interface", "fa3_fwd_interface")


@dataclass(frozen=True)
class Backend:
    """call(q, k, v, causal, scale) -> out [batch, num_q_heads, q_len, head_dim], lse [batch, num_q_heads, q_len] float32.

    q [batch, num_q_heads, q_len, head_dim]; k, v [batch, num_kv_heads, kv_len, head_dim]; any strides with head_dim contiguous.
    """

    call: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
    device: str
    dtypes: tuple[torch.dtype, ...]
    bottom_right: bool = False  # causal with kv_len > q_len: the last query sees the last key
    plans: bool = False  # the host prepares every new shape at length
    usable: Callable[[Tensor], bool] = lambda sample: True  # sample: q of a small call; torch's own check, or the library's

    def require(self, q: Tensor, name: str) -> None:
        """Raises ValueError naming what was given unless q [batch, num_q_heads, q_len, head_dim] is served."""
        if not serves(name, q.device, q.dtype, q.shape[3]):
            dtypes = ", ".join(str(dtype)[6:] for dtype in self.dtypes)
            raise ValueError(
                f"prefill backend '{name}' serves {dtypes} on {self.device}, as far as the GPU and torch {torch.__version__} do; "
                f"got {str(q.dtype)[6:]} on {q.device.type} with head_dim {q.shape[3]}"
            )


@functools.cache
def serves(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a backend takes this dtype and head_dim on this device. ImportError: the library asked for is not installed."""
    backend = BACKENDS[name]
    if device.type != backend.device or dtype not in backend.dtypes:
        return False
    return bool(backend.usable(torch.empty(1, 1, _SAMPLE_TOKENS, head_dim, dtype=dtype, device=device)))


def _torch_allows(check: Callable) -> Callable[[Tensor], bool]:
    return lambda sample: check(torch.backends.cuda.SDPAParams(sample, sample, sample, None, 0.0, True, False))


def _flash(q, k, v, causal, scale):
    return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]


def _cudnn(q, k, v, causal, scale):
    out, lse = _aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
    return out, lse.reshape(out.shape[:3])


def _torch_cpu(q, k, v, causal, scale):
    return _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _fa3(q, k, v, causal, scale):
    attend = _fa3_module().flash_attn_with_kvcache
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out, lse, *_ = attend(q, k, v, softmax_scale=scale, causal=causal, return_softmax_lse=True)
    return out.transpose(1, 2), lse


@functools.cache
def _fa3_module():
    for name in _FA3_MODULES:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
    raise ImportError("prefill backend 'fa3' needs FlashAttention-3: pip install fa3-fwd (bfloat16 only), or build flash_attn_3")


def _fa3_serves(sample: Tensor) -> bool:
    halves_only_bf16 = _fa3_module().__name__ == "fa3_fwd_interface"
    return sample.dtype == torch.bfloat16 or not halves_only_bf16


_HALVES = (torch.bfloat16, torch.float16)
_cuda = torch.backends.cuda

BACKENDS: dict[str, Backend] = {
    "cudnn": Backend(_cudnn, "cuda", _HALVES, plans=True, usable=_torch_allows(_cuda.can_use_cudnn_attention)),
    "flash": Backend(_flash, "cuda", _HALVES, bottom_right=True, usable=_torch_allows(_cuda.can_use_flash_attention)),
    "fa3": Backend(_fa3, "cuda", _HALVES, bottom_right=True, usable=_fa3_serves),
    "torch_cpu": Backend(_torch_cpu, "cpu", (torch.float32, *_HALVES)),
}


@functools.cache
@torch.no_grad()
def ranking(device: torch.device, dtype: torch.dtype, num_q_heads: int, num_kv_heads: int, head_dim: int) -> tuple[str, ...]:
    """ "zigzag" and the torch backends that serve this geometry on this GPU, fastest first: measured once per process.

    One causal chunk of 4096 tokens, the median of five calls. A backend that fails or that disagrees with our kernel is left
    out with a warning. fa3 takes no part: it runs when asked for.
    """
    with torch.inference_mode(False), torch.cuda.device(device):
        generator = torch.Generator(device).manual_seed(0)  # the global one stays as it is: a seeded generation must not change
        q, k, v = (
            torch.empty(1, heads, _TRIAL_TOKENS, head_dim, dtype=dtype, device=device).normal_(generator=generator)
            for heads in (num_q_heads, num_kv_heads, num_kv_heads)
        )
        scale = head_dim**-0.5
        workspace = ops.new_workspace(device)
        lengths = torch.zeros(1, dtype=torch.int32, device=device)

        def ours():
            return ops.attention(q, k, v, k[:, :, :0], v[:, :, :0], lengths, scale=scale, workspace=workspace)[0]

        expected = ours()
        seconds = {"zigzag": _median_milliseconds(ours)}
        for name in ("cudnn", "flash"):
            if not serves(name, device, dtype, head_dim):
                continue
            try:
                run = functools.partial(BACKENDS[name].call, q, k, v, True, scale)
                difference = float((run()[0] - expected).norm() / expected.norm())
                if not difference < _TOLERANCE:
                    raise RuntimeError(f"its output differs from this package's by {difference:.1e}")
                seconds[name] = _median_milliseconds(run)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                warnings.warn(f"prefill backend {name} is not used for {dtype}, head_dim {head_dim}: {reason}", stacklevel=2)
    return tuple(sorted(seconds, key=seconds.get))


def _median_milliseconds(run: Callable[[], object]) -> float:
    run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_TRIALS)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[_TRIALS // 2]
