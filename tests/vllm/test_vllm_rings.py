"""The arithmetic of the plugin's attention, against the specification over all tokens. No vLLM is needed."""

import pytest
import torch

from zigzag_ext.attention import ops, reference
from zigzag_ext.vllm.rings import ring_positions, runs

DIM = 64


@pytest.mark.parametrize("sink, window", [(0, 1), (0, 5), (3, 1), (4, 7), (20, 70)])
@pytest.mark.parametrize("q_len", [1, 2, 40])
def test_rings_of_gathered_tokens_are_attended_as_all_tokens_are(sink, window, q_len):
    """Tokens of the gap are NaN in the cache that is gathered from: none is read."""
    draw = torch.Generator().manual_seed(sink + window + q_len)
    random = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    past = torch.tensor([0, 1, sink, sink + 1, window, sink + window - 1, sink + window, 200])
    rows, tokens = len(past), int(past.max())
    q, k, v = random(rows, 4, q_len, DIM), random(rows, 2, q_len, DIM), random(rows, 2, q_len, DIM)
    keys, values = random(rows, 2, tokens, DIM), random(rows, 2, tokens, DIM)
    place, slots = torch.arange(tokens), torch.arange(tokens + q_len)
    gap = ((place >= sink) & (place <= past[:, None] - window)) | (place >= past[:, None])
    kept = torch.cat([keys, values], -1).masked_fill(gap[:, None, :, None], torch.nan)

    positions, held = ring_positions(past, sink, window)
    assert positions.shape == (rows, sink + window) and held.tolist() == [min(int(p), sink + window - 1) for p in past]
    rings = kept[torch.arange(rows)[:, None], :, positions].transpose(1, 2)
    out, _ = ops.attention(q, k, v, *rings.split(DIM, dim=-1), held, sink=sink, window=window)

    for row in range(rows):
        length = int(past[row])
        seen = reference.visible(slots[None, : length + q_len], length + torch.arange(q_len)[:, None], sink, window)
        pairs = ((keys, k), (values, v))
        together = [torch.cat([old[row, :, :length], new[row]], 1).repeat_interleave(2, 0) for old, new in pairs]
        expected = torch.nn.functional.scaled_dot_product_attention(q[row], *together, attn_mask=seen)
        torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("starts, expected", [
    ([0, 1, 2, 3], [(slice(0, 3), slice(0, 3), 1)]),
    ([0, 1, 2, 9, 16, 19], [(slice(0, 2), slice(0, 2), 1), (slice(2, 4), slice(2, 16), 7), (slice(4, 5), slice(16, 19), 3)]),
    ([0, 7, 7, 7], [(slice(0, 1), slice(0, 7), 7)]),
    ([0, 0], []),
])  # fmt: skip
def test_runs_of_requests(starts, expected):
    assert runs(starts) == expected
