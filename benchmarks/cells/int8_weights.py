"""A model of random int8 weights that never exists as a whole in 16 bits: Linear by Linear, by torchao.

Source: https://github.com/pytorch/ao (Int8WeightOnlyConfig: symmetric, one scale per row; the embedding stays as it is).
"""

import torch
from torch import nn
from transformers import AutoModelForCausalLM


def build_int8(config, dtype: torch.dtype, device: str):
    """Raises ImportError without torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its buffers are no parameters
    options = Int8WeightOnlyConfig(set_inductor_config=False)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.ones(parameter.shape, dtype=dtype, device=device)  # of norms
            if isinstance(module, nn.Linear | nn.Embedding):
                value.normal_(0, config.initializer_range)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        if isinstance(module, nn.Linear):
            quantize_(module, options)
    return model
