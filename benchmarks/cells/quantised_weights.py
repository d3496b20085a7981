"""A model of random quantised weights that never exists as a whole in 16 bits: layer by layer, as `zigzag --weights` has them."""

from copy import deepcopy

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from zigzag_ext.study.weights import codes_of


def build_quantised(config, weights: str, device: str):
    """weights: int8 or int4. Raises ImportError without torchao."""
    from torchao.quantization import quantize_

    config = deepcopy(config)
    config.pad_token_id, config.eos_token_id = 0, None
    dtype = torch.bfloat16 if device == "cuda" or weights == "int4" else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its buffers are no parameters
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.ones(parameter.shape, dtype=dtype, device=device)  # of norms
            if isinstance(module, nn.Linear | nn.Embedding):
                value.normal_(0, config.initializer_range)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
        if isinstance(module, nn.Linear):
            quantize_(module, codes_of(module, weights, module is model.get_output_embeddings(), device))
    return model
