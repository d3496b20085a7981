"""What is measured: every benchmark cell by name."""

from dataclasses import dataclass

from zigzag_ext import _C
from zigzag_ext.planning.kv_format import PLAIN, parse_kv_format

BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
QUANTISED = ("fp8", "int8", "int4", "int8/int4")  # formats of keys/values; queries and new tokens are then bf16
K = 1024


def token_bytes(kv_format: str, head_dim: int) -> int:
    """Key and value of one token and head, scales included."""
    codes = PLAIN if kv_format in BYTES else parse_kv_format("kv_format", kv_format)
    return _C.kv_bytes(1, 1, head_dim, BYTES.get(kv_format, BYTES["bf16"]), codes)


@dataclass(frozen=True)
class Cell:
    """One shape of decode attention. `window == 0` is a full cache; otherwise a ring of sink + window slots, always full."""

    scenario: str
    kv_lens: tuple[int, ...]  # per row: keys that the last new token attends, itself included
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    q_len: int = 1
    sink: int = 0
    window: int = 0
    kv_format: str = "bf16"
    quick: bool = False  # part of the two-minute subset

    def __post_init__(self):
        # A second call on the same ring would find slots that earlier queries of its chunk still see overwritten.
        if self.window and (self.q_len != 1 or set(self.kv_lens) != {self.sink + self.window}):
            raise ValueError(f"{self.scenario}: a ring cell needs q_len 1 and kv_len {self.sink + self.window} in every row")

    @property
    def op(self) -> str:
        return "decode_stream" if self.window else "decode_full"

    @property
    def batch(self) -> int:
        return len(self.kv_lens)

    @property
    def slots(self) -> int:
        return max(self.kv_lens)

    @property
    def seq_lens(self) -> tuple[int, ...]:
        """Tokens seen before the call. A ring has wrapped a few times, not at a round number."""
        if self.window:
            return (self.sink + 3 * self.window + self.window // 3,) * self.batch
        return tuple(length - self.q_len for length in self.kv_lens)

    @property
    def kv_bytes(self) -> int:
        """K and V of the attended keys, each read once."""
        return sum(self.kv_lens) * self.num_kv_heads * token_bytes(self.kv_format, self.head_dim)

    @property
    def quantised(self) -> bool:
        return self.kv_format in QUANTISED


def ring(scenario: str, sink: int, window: int, batch: int = 1, **shape) -> Cell:
    return Cell(scenario, (sink + window,) * batch, sink=sink, window=window, **shape)


# Few KV heads, as recent models have them and tensor parallelism leaves them: (query heads, KV heads).
FEW_HEADS = [(28, 4), (32, 4), (64, 4), (16, 2), (32, 2), (8, 1)]

CUDA = [
    Cell("decode_1x1k", (K,)),
    Cell("decode_1x4k", (4 * K,), quick=True),
    Cell("decode_1x16k", (16 * K,)),
    Cell("decode_1x32k", (32 * K,), quick=True),
    Cell("decode_1x128k", (128 * K,), quick=True),
    Cell("decode_1x512k", (512 * K,)),
    Cell("decode_8x4k", (4 * K,) * 8),
    Cell("decode_8x32k", (32 * K,) * 8, quick=True),
    Cell("mha_1x4k", (4 * K,), num_kv_heads=32, quick=True),
    Cell("mha_1x32k", (32 * K,), num_kv_heads=32),
    Cell("ragged_64k_31x4k", (64 * K,) + (4 * K,) * 31),
    Cell("ragged_uniform_32x6016", (6016,) * 32),  # the bytes of ragged_64k_31x4k in equal rows
    Cell("group2_1x32k", (32 * K,), num_q_heads=16),
    Cell("group5_1x32k", (32 * K,), num_q_heads=40),
    Cell("d64_1x32k", (32 * K,), head_dim=64),
    Cell("d96_1x32k", (32 * K,), head_dim=96),
    Cell("d256_1x32k", (32 * K,), head_dim=256),
    Cell("verify4_1x32k", (32 * K,), q_len=4),
    *(Cell(f"kv{kv}_{q}q_1x{n}k", (n * K,), num_q_heads=q, num_kv_heads=kv) for q, kv in FEW_HEADS for n in (8, 32, 128)),
    *(Cell(f"verify{t}_1x{n}k", (n * K,), q_len=t) for t in (8, 16) for n in (32, 128)),
    *(Cell(f"verify{t}_kv4_{q}q_1x128k", (128 * K,), q_len=t, num_q_heads=q, num_kv_heads=4) for t in (8, 16) for q in (28, 32)),
    Cell("decode_1x8k_int4", (8 * K,), kv_format="int4"),
    *(Cell(f"decode_1x4k_{f}", (4 * K,), kv_format=f) for f in ("fp8", "int8", "int4")),
    *(Cell(f"decode_1x32k_{f}", (32 * K,), kv_format=f) for f in ("fp8", "int8", "int4")),
    *(Cell(f"decode_1x128k_{f.replace('/', '_')}", (128 * K,), kv_format=f) for f in QUANTISED),
    Cell("decode_8x32k_fp8", (32 * K,) * 8, kv_format="fp8"),
    Cell("decode_1x512k_fp8", (512 * K,), kv_format="fp8"),
    ring("ring_64+256", 64, 256, quick=True),
    ring("ring_64+1024", 64, 1024, quick=True),
    ring("ring_64+256_int8", 64, 256, kv_format="int8"),
    ring("ring_64+256_b8", 64, 256, batch=8),
    ring("ring_64+256_b64", 64, 256, batch=64),
    ring("ring_64+256_mha", 64, 256, num_kv_heads=32),
]

CPU = [
    Cell("decode_1x1k", (K,)),
    Cell("decode_1x8k", (8 * K,), quick=True),
    Cell("decode_1x32k", (32 * K,)),
    Cell("decode_1x8k_fp32", (8 * K,), kv_format="fp32", quick=True),
    Cell("decode_1x32k_fp32", (32 * K,), kv_format="fp32"),
    Cell("mha_1x4k", (4 * K,), num_kv_heads=32),
    *(Cell(f"decode_1x8k_{f}", (8 * K,), kv_format=f) for f in ("fp8", "int8", "int4")),
    ring("ring_64+256", 64, 256, quick=True),
    ring("ring_64+1024", 64, 1024),
    ring("ring_64+256_fp32", 64, 256, kv_format="fp32"),
]

BY_DEVICE = {"cuda": CUDA, "cpu": CPU}
