"""A model of your own with ZigzagAttention: a prompt, then token by token, equal to all at once."""

import torch
from torch import nn

import zigzag_ext as zz

HEADS, KV_HEADS, HEAD_DIM, WIDTH = 4, 2, 64, 128


class Block(nn.Module):
    """One decoder layer; its attention holds its own cache."""

    def __init__(self, kind: str):
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * KV_HEADS * HEAD_DIM)
        self.attention = zz.ZigzagAttention(HEADS, KV_HEADS, HEAD_DIM, kind=kind, sink=4, window=16, max_len=1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, tokens, WIDTH]
        q = self.q(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, KV_HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        # q, k: rotate them here, at absolute positions, if your model has RoPE.
        return x + self.out(self.attention(q, k, v).transpose(1, 2).flatten(2))


torch.manual_seed(0)
model = nn.Sequential(Block("retrieval"), Block("streaming"), Block("streaming")).eval()
x = torch.randn(1, 100, WIDTH)
with torch.inference_mode():
    whole = model(x)
    for block in model:
        block.attention.reset()
    pieces = [model(x[:, :60]), *(model(x[:, i : i + 1]) for i in range(60, 100))]
print("largest difference:", f"{(torch.cat(pieces, 1) - whole).abs().max():.0e}")
for block in model:
    print(block.attention)
