"""Weights of linear layers as int8 or int4 codes, by torchao.

int8 is symmetric with one scale per output; int4 has a scale and a zero point per 64 inputs, fitted by HQQ. The output head, and
layers whose shapes the int4 kernels do not take, are int8 in both. Embeddings, norms and biases stay as they are.
Source: https://github.com/pytorch/ao (Int8WeightOnlyConfig; Int4WeightOnlyConfig as tile_packed_to_4d on CUDA, on a CPU
torchao.prototype's Int4OpaqueTensor: torch has the kernels of both, other formats of int4 need more packages).
"""

import importlib.util

import torch
from torch import nn

from ..hf.served import auto_class

FORMATS = ("int8", "int4")
GROUP = 64  # inputs per scale; 128 does not divide the widths of many small models
_MOST_LEFT = 0.05  # share of the weights that a step reads


def check_weights(name: str, source: str, config, dtype: str) -> None:
    """Raises what `quantise` could not do with a model of this config, before its weights are read."""
    if name not in FORMATS:
        raise ValueError(f"unsupported weights '{name}'; use {' or '.join(FORMATS)}")
    if importlib.util.find_spec("torchao") is None:
        raise ModuleNotFoundError("quantised weights need the package torchao:  pip install torchao")
    if name == "int4" and dtype not in ("auto", "bfloat16"):  # on a CPU others take 60 times as long
        raise ValueError(f"int4 weights are multiplied in bfloat16, the dtype asked for is {dtype}")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"the weights of {source} are quantised already: they stay as they are")
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    _check_linear(model, source)


def _check_linear(model: nn.Module, source: str) -> None:
    """Raises ValueError if much would stay as it is: weights that are no linear layer's, such as experts in one tensor."""
    linear, others = 0, {}
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear):
                linear += weight.numel()
            elif not isinstance(module, nn.Embedding):
                others[f"{path}.{name}"] = weight.numel()
    share = sum(others.values()) / max(1, linear + sum(others.values()))
    if share > _MOST_LEFT:
        largest = max(others, key=others.get)
        raise ValueError(
            f"{share:.0%} of the weights of {source} are no linear layer's, such as {largest}: they cannot be quantised"
        )


def quantise(model: nn.Module, name: str, device: torch.device) -> None:
    """Quantises the linear layers in place, one after the other on `device`, where the whole model is then."""
    from torchao.quantization import quantize_

    head = model.get_output_embeddings()
    for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
        quantize_(layer, codes_of(layer, name, layer is head, device.type), device=device)
    model.to(device)


def codes_of(layer: nn.Linear, name: str, is_head: bool, device_type: str):
    """torchao's config for one layer."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    common = {"set_inductor_config": False}  # torchao's settings of the compiler would stay for all models of the process
    if name == "int8" or is_head or layer.in_features % GROUP or layer.out_features % 16:
        return Int8WeightOnlyConfig(**common)
    common |= {"group_size": GROUP, "int4_choose_qparams_algorithm": "hqq"}
    if device_type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(**common)
    return Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d", **common)


def weights_of(model: nn.Module) -> str:
    """What the weights of linear layers are where they are no plain tensors, such as ", Int8Tensor", behind the model's dtype."""
    weights = (module.weight for module in model.modules() if isinstance(module, nn.Linear))
    return "".join(f", {name}" for name in sorted({type(weight).__name__ for weight in weights} - {"Parameter", "Tensor"}))
