"""Inputs for the op tests, and the comparison with the specification in float64."""

from dataclasses import dataclass, field, replace

import torch

from zigzag_ext.attention import ops, reference

TENSORS = ("q", "k_new", "v_new", "k_cache", "v_cache", "seq_lens")
DTYPES = {"cpu": [torch.float32, torch.bfloat16, torch.float16], "cuda": [torch.bfloat16, torch.float16]}
# Added to twice the error of torch's own attention in the same dtype: relative size of one rounding of the output.
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    """One call of `ops.attention`; `seq_lens` fixes the batch. Slots that hold nothing a query may see are NaN."""

    seq_lens: tuple[int, ...]
    q_len: int = 1
    group: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    sink: int = 0
    window: int = 0
    pad: tuple[int, ...] | None = None
    slack: int = 0  # slots of a ring beyond sink + window
    cache_rows: tuple[int, ...] | None = None  # of each batch row, -1: skipped; the caches have two rows more than any names
    spare_slots: int = 3  # free slots of a full cache after the call
    strided: bool = False  # caches and q are views into larger, differently ordered memory
    rotary_dim: int = 0  # > 0: the op applies RoPE, by random tables whose halves differ
    softcap: float = 0.0  # of logits
    sink_logits: bool = False  # random ones per query head
    table_dtype: torch.dtype | None = None  # of cos and sin; None: that of q
    shared_table: bool = False  # one table for all rows of the batch
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    tensors: dict = field(default_factory=dict, compare=False, repr=False)

    @property
    def slots(self) -> int:
        return self.sink + self.window + self.slack if self.window else max(self.seq_lens) + self.q_len + self.spare_slots

    @property
    def rows(self) -> list[int]:
        """The cache row of each batch row."""
        return list(range(len(self.seq_lens)) if self.cache_rows is None else self.cache_rows)

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each cache row; of rows that no batch row names, a number that is not true."""
        if self.cache_rows is None:
            return list(self.seq_lens)
        named = {row: length for row, length in zip(self.cache_rows, self.seq_lens, strict=True) if row >= 0}
        return [named.get(row, 11) for row in range(max((*named, -1)) + 3)]

    def held(self, row: int) -> torch.Tensor:
        """[slots] positions that a cache row holds, -1 where nothing or where no batch row names it."""
        if row not in self.rows:
            return torch.full((self.slots,), -1)
        return reference.position_of(self.slots, self.lengths[row], self.sink, self.window)

    def pad_of(self, b: int) -> int:
        return min(max(self.pad[b], 0), self.q_len) if self.pad else 0

    def build(self, seed: int = 0) -> dict[str, torch.Tensor | None]:
        """q, k_new, v_new, k_cache, v_cache, seq_lens and pad by name; with RoPE also cos and sin."""
        rng = torch.Generator().manual_seed(seed)
        batch, num_q_heads = len(self.seq_lens), self.num_kv_heads * self.group

        def random(heads, tokens, batch=batch):
            if self.strided:  # tokens before heads in memory, with unused columns beyond head_dim
                base = torch.randn(batch, tokens, heads, self.head_dim + 16, generator=rng).to(self.dtype).to(self.device)
                return base[..., : self.head_dim].transpose(1, 2)
            return torch.randn(batch, heads, tokens, self.head_dim, generator=rng).to(self.dtype).to(self.device)

        built = {"q": random(num_q_heads, self.q_len) * 2.5}
        if self.strided:
            built["q"] = random(num_q_heads, self.q_len)
        for name in ("k", "v"):
            built[f"{name}_new"] = random(self.num_kv_heads, self.q_len)
            cache = random(self.num_kv_heads, self.slots, len(self.lengths))
            for row in range(len(self.lengths)):
                cache[row][:, self.held(row) < 0] = torch.nan
            built[f"{name}_cache"] = cache
        built["seq_lens"] = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        built["pad"] = None if self.pad is None else torch.tensor(self.pad, dtype=torch.int32, device=self.device)
        if self.cache_rows is not None:
            built["cache_rows"] = torch.tensor(self.cache_rows, dtype=torch.int32, device=self.device)
        if self.sink_logits:
            built["sink_logits"] = (torch.randn(num_q_heads, generator=rng) * 4).to(self.device)
        if self.rotary_dim:
            for name in ("cos", "sin"):
                size = (1 if self.shared_table else batch, self.q_len, self.rotary_dim + 8)  # rows apart by more than they hold
                table = torch.rand(size, generator=rng) * 2 - 1
                built[name] = table.to(self.table_dtype or self.dtype).to(self.device)[..., : self.rotary_dim]
        return built

    def on(self, device: str, dtype: torch.dtype) -> "Case":
        return replace(self, device=device, dtype=dtype)


def call(op_inputs: dict, case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.attention(**op_inputs, sink=case.sink, window=case.window, scale=case.head_dim**-0.5, softcap=case.softcap)


def lengths_after(inputs: dict, tokens: int) -> torch.Tensor:
    """seq_lens once `tokens` columns, of which `pad` are padding, have been appended."""
    rows, pad = inputs.get("cache_rows"), inputs["pad"]
    added = torch.full_like(inputs["seq_lens"] if rows is None else rows, tokens)
    added = added if pad is None else added - pad.clamp(0, tokens)
    if rows is None:
        return inputs["seq_lens"] + added
    return inputs["seq_lens"].index_add(0, rows[rows >= 0], added[rows >= 0])


def after_rope(inputs: dict) -> dict:
    """The inputs of the call without cos and sin that means the same."""
    if inputs.get("cos") is None:
        return inputs
    turned = {n: reference.rotate(inputs[n], inputs["cos"], inputs["sin"]) for n in ("q", "k_new")}
    return {n: t for n, t in inputs.items() if n not in ("cos", "sin")} | turned


def specification(inputs: dict, case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, lse, k_cache, v_cache of `reference.attention` in float64 on the CPU."""
    inputs = after_rope(inputs)  # before the step to float64: rotated queries and keys are rounded to the dtype
    wide = {n: None if t is None else t.cpu() if t.dtype == torch.int32 else t.cpu().double() for n, t in inputs.items()}
    options = {"sink": case.sink, "window": case.window, "scale": case.head_dim**-0.5, "cache_rows": wide.get("cache_rows")}
    options |= {"softcap": case.softcap, "sink_logits": wide.get("sink_logits")}
    out, lse = reference.attention(*(wide[n] for n in TENSORS), pad=wide["pad"], **options)
    return out, lse, wide["k_cache"], wide["v_cache"]


def torch_error(inputs: dict, case: Case, expected: torch.Tensor) -> float:
    """Relative error of torch's masked attention in the case's dtype, the yardstick for ours."""
    import torch.nn.functional as F

    worst, inputs = 0.0, after_rope(inputs)
    for b, (row, length) in enumerate(zip(case.rows, case.seq_lens, strict=True)):
        first = case.pad_of(b)
        if first == case.q_len or row < 0:
            continue
        held = case.held(row).to(case.device)
        query = length + torch.arange(case.q_len - first, device=case.device)
        key = torch.cat([held[held >= 0], query])
        k, v = (torch.cat([inputs[f"{n}_cache"][row][:, held >= 0], inputs[f"{n}_new"][b, :, first:]], 1) for n in "kv")
        mask = reference.visible(key, query[:, None], case.sink, case.window)
        k, v = (t.repeat_interleave(case.group, 0)[None] for t in (k, v))
        q, sinks = inputs["q"][b : b + 1, :, first:], inputs.get("sink_logits")
        if case.softcap or sinks is not None:
            out = _eager(q, k, v, mask, case.head_dim**-0.5, case.softcap, sinks)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, scale=case.head_dim**-0.5)
        worst = max(worst, relative_error(out[0].cpu().double(), expected[b, :, first:]))
    return worst


def _eager(q, k, v, mask, scale: float, softcap: float, sinks: torch.Tensor | None) -> torch.Tensor:
    """As eager attention of transformers computes caps and learned sinks, logits in the dtype of q."""
    logits = q @ k.transpose(2, 3) * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.to(q.dtype).reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    return logits.softmax(-1)[..., : k.shape[2]] @ v


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest ||actual - expected|| / ||expected|| over rows of head_dim; NaN counts as infinite."""
    error = (actual.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)
    return float(torch.nan_to_num(error, nan=torch.inf).max()) if error.numel() else 0.0


def check(case: Case, seed: int = 0) -> None:
    """Runs the op and compares output, lse and cache content with the specification."""
    inputs = case.build(seed)
    expected_out, expected_lse, expected_k, expected_v = specification(inputs, case)
    allowed = 2 * torch_error(inputs, case, expected_out) + FLOOR[case.dtype]
    out, lse = call(inputs, case)
    out, lse = out.cpu(), lse.cpu()
    padding = torch.isneginf(expected_lse)
    assert torch.equal(torch.isneginf(lse), padding), "padding columns must have lse -inf, all others a finite one"
    assert (out[padding] == 0).all(), "padding columns must be zero"
    error = relative_error(out[~padding], expected_out[~padding])
    assert error <= allowed, f"relative error {error:.2e}, allowed {allowed:.2e}"
    torch.testing.assert_close(lse[~padding].double(), expected_lse[~padding].double(), atol=2e-3, rtol=1e-4)
    for name, expected in (("k_cache", expected_k), ("v_cache", expected_v)):
        cached = inputs[name].cpu().double()
        if name == "k_cache" and case.rotary_dim:
            check_rotated(cached, expected, case.dtype)
        else:
            torch.testing.assert_close(cached, expected, rtol=0, atol=0, equal_nan=True, msg=f"{name} differs")


def check_rotated(cached: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Keys rotated in float32 may differ from those rotated in float64 where a tie is near: by one rounding, and rarely."""
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(cached, expected, rtol=eps, atol=2e-6, equal_nan=True, msg="rotated keys differ")
    if dtype != torch.float32:
        written = ~expected.isnan()
        assert (cached[written] != expected[written]).double().mean() < 2e-3
