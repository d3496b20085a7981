"""The config of an enabled model: one of its own, which says "zigzag" and whose copies say what the model had before.

A config may be shared by several models, and may be copied to make another model or to be saved; only the enabled one attends
through this package. Of a composite model the text decoder's config says so; its other parts attend as before.
"""

import copy

from torch import nn
from torch.utils import _pytree
from transformers import PreTrainedConfig, PreTrainedModel

from ..planning.layers import text_config
from .attention import NAME


class _Implementation(str):
    """NAME, in a config; in its copies and in files: the former implementation."""

    def __new__(cls, former: str | None):
        self = super().__new__(cls, NAME)
        self.former = former
        return self

    def __deepcopy__(self, memo: dict) -> str | None:
        return self.former

    def __reduce_ex__(self, protocol: int):
        return copy.copy, (self.former,)


# For the compiler: that of torch 2.11 takes no other subclass of str for a constant.
_pytree.register_constant(_Implementation)


def is_composite(model: nn.Module) -> bool:
    """Whether the text decoder is one part of the model among others."""
    return text_config(model.config) is not model.config


def text_decoder(model: nn.Module) -> nn.Module | None:
    """What has the layers that a plan is for: the model, or of a composite one the part made from its text config, if any."""
    if not is_composite(model):
        return model
    config = text_config(model.config)
    return next((part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is config), None)


def set_implementation(model: nn.Module, name: str) -> None:
    """What the layers of the text decoder attend with, and nothing beside them.

    Raises RuntimeError, and changes nothing, if they do not take their attention from transformers' AttentionInterface.
    """
    decoder = text_decoder(model)
    decoder.set_attn_implementation({"": name})
    if decoder.config._attn_implementation != name:
        raise RuntimeError(f"{model.config.model_type} does not take its attention from transformers' AttentionInterface")


def use_zigzag(given: nn.Module, model: nn.Module, undo: dict[int, object]) -> None:
    """Gives `model`, and `given`, which is the model or wraps it, a config of their own whose text decoder's says NAME.

    undo: gets what `exchange_configs(given, undo)` undoes it with, whenever it is interrupted. Raises RuntimeError if the model
    does not take its attention from transformers' AttentionInterface.
    """
    copies: dict = {}
    copy.deepcopy(model.config, copies)
    exchange_configs(given, copies, undo)
    own = text_config(model.config)
    former = own._attn_implementation
    set_implementation(model, NAME)
    own._attn_implementation = {"": _Implementation(former)}


def use_former(model: nn.Module) -> None:
    """Undoes `use_zigzag`; the config stays the model's own."""
    implementation = text_config(model.config)._attn_implementation
    set_implementation(model, getattr(implementation, "former", implementation))


def exchange_configs(given: nn.Module, others: dict[int, object], undo: dict[int, object]) -> None:
    """Gives modules the config `others[id(config)]` for theirs, where there is one. `undo`: the `others` that undo it."""
    for module in given.modules():
        for name, config in list(vars(module).items()):
            if isinstance(config, PreTrainedConfig) and (other := others.get(id(config))) is not None:
                undo[id(other)] = config  # beforehand: an interrupt may come between the two
                setattr(module, name, other)
