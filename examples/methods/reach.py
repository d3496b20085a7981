"""A method of one's own for `zigzag compare` and `zigzag identify`: how far back a head looks.

    zigzag compare MODEL --method examples.methods.reach:reach --method retrieval

It is given the model as transformers loads it, and needs nothing of zigzag_ext but a text to read.
"""

import torch

from zigzag_ext.study.evaluate.haystack import python_reference


@torch.no_grad()
def reach(model, tokenizer, *, sink: int, window: int, seed: int, tokens: int = 512, prompts: int = 2) -> torch.Tensor:
    """Mean distance from the last queries to the keys they attend to, the sink apart, as a share of the longest one.

    Returns [layers, kv_heads] in [0, 1]; a KV head is as far-sighted as the query head of its group that looks furthest.
    """
    ids = tokenizer(python_reference(), add_special_tokens=False, verbose=False)["input_ids"]
    generator = torch.Generator().manual_seed(seed)
    groups = model.config.num_key_value_heads
    model.set_attn_implementation("eager")  # the one that returns attention weights
    found = []
    for _ in range(prompts):
        start = int(torch.randint(len(ids) - tokens, (), generator=generator))
        passage = torch.tensor([ids[start : start + tokens]], device=model.device)
        weights = model(passage, output_attentions=True, use_cache=False, logits_to_keep=1).attentions
        queries = torch.arange(tokens - tokens // 4, tokens, device=model.device)
        distance = (queries[:, None] - torch.arange(tokens, device=model.device)).clamp(min=0) / tokens
        distance[:, :sink] = 0
        per_head = torch.stack([(layer[0, :, queries].float() * distance).sum(-1).mean(-1) for layer in weights])
        found.append(per_head.unflatten(1, (groups, -1)).amax(-1))
    return torch.stack(found).mean(0)
