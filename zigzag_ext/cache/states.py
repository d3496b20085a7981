"""Layers with a state of fixed size beside keys and values, or in their place: linear attention, recurrence, convolution.

transformers' own layer classes hold and update such states, as they do in its `DynamicCache`. What is added here: a cache knows
whether the states are those of its rows, rows are selected in place, and a state cannot go back, only start again.
"""

import inspect
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor
from transformers import cache_utils

from ..attention.store import in_normal_mode
from .layer import ZigzagLayer
from .state import Addresses

if TYPE_CHECKING:
    from .rows import Rows
    from .state import CacheState

# Older transformers have no such classes, or ones that do not go on with a chunk of several tokens.
_Plain = getattr(cache_utils, "LinearAttentionLayer", None)
SERVED = _Plain is not None and "conv_kernel_size" in inspect.signature(_Plain.update_conv_state).parameters
SINCE = "5.14"  # the first transformers that has them
_Mixin = cache_utils.LinearAttentionCacheLayerMixin if SERVED else object


def check_served(config) -> None:
    """Raises ValueError by name if this transformers cannot hold the states of a hybrid model."""
    if not SERVED:
        raise ValueError(
            f"{config.model_type}: its layers with recurrent or convolution states need transformers {SINCE} or newer, "
            f"{transformers.__version__} is installed"
        )


class StateLayer(_Plain if SERVED else object):
    """The convolution and recurrent states of one layer, in the model's own shapes, [batch, ...] each.

    keeps: False for a layer of a hybrid model that has no state, either, and so is never asked for one. is_dirty: whether the
    forward under way may have changed the states, told by its reading them: some kernels write where they read.
    """

    def __init__(self, state: "CacheState", index: int, number_of_states: int, keeps: bool):
        self.state, self.index, self.keeps, self.is_dirty = state, index, keeps, False
        super().__init__(number_of_states=number_of_states)

    @property
    def conv_states(self) -> dict[int, Tensor | None]:
        self._note()
        return self._conv_states

    @conv_states.setter
    def conv_states(self, states: dict) -> None:
        self._conv_states = states

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:
        self._note()
        return self._recurrent_states

    @recurrent_states.setter
    def recurrent_states(self, states: dict) -> None:
        self._recurrent_states = states

    def _note(self) -> None:
        if self.state.forward is not None:
            self.state.forward.read.add(self.index)
            self.is_dirty = True

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The states that there are, by name: conv.0, recurrent.0 and so on."""
        both = {"conv": self._conv_states, "recurrent": self._recurrent_states}
        return {f"{name}.{i}": t for name, states in both.items() for i, t in states.items() if t is not None}

    @property
    def memory_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def is_croppable(self) -> bool:
        return not self.keeps

    @in_normal_mode
    def lazy_initialization(self, *args, **kwargs) -> None:
        super().lazy_initialization(*args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **kwargs) -> Tensor:
        self._follow(self._conv_states, self.is_conv_states_initialized, state_idx, conv_states, conv_states.shape[:-1])
        return super().update_conv_state(conv_states, state_idx, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs) -> Tensor:
        self._follow(
            self._recurrent_states, self.is_recurrent_states_initialized, state_idx, recurrent_states, recurrent_states.shape
        )
        return super().update_recurrent_state(recurrent_states, state_idx, **kwargs)

    def _follow(self, states: dict, initialized: dict, number: int, new: Tensor, shape: tuple[int, ...]) -> None:
        """Lets go of a state of another dtype, device or shape than a new one. Raises ValueError if it is of tokens held."""
        held = states[number]
        if held is None or (held.dtype, held.device, held.shape[: len(shape)]) == (new.dtype, new.device, shape):
            return
        if not self.state.columns:
            states[number], initialized[number] = None, False
            self.state.addresses = Addresses()
        elif (held.device, held.shape[: len(shape)]) != (new.device, shape) or states is self._conv_states:
            raise ValueError(
                f"layer {self.index} of the cache holds a {str(held.dtype)[6:]} state {list(held.shape)} on {held.device}, the "
                f"model now gives {str(new.dtype)[6:]} {list(new.shape)} on {new.device}: reset() the cache, or use the model as "
                "it was"
            )

    def is_whole(self, rows: "Rows") -> bool:
        """Whether the states are those of `rows`: of the rows as they are, since nothing is kept of earlier ones, or of none."""
        return not self.keeps or not rows.columns or (not self.is_dirty and (rows.ends == self.state.rows.ends).all())

    def restart(self) -> None:
        """As before the first token; buffers stay where they are."""
        self.reset()
        self.is_dirty = False

    def release(self) -> None:
        """Nothing: states do not grow."""

    def drop(self) -> None:
        super().__init__(number_of_states=self.number_of_states)
        self.is_dirty = False

    @in_normal_mode
    def select_rows(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was; as many rows as before, in place, so that addresses do not change."""
        for states, chosen in zip((self._conv_states, self._recurrent_states), self.with_rows(index), strict=True):
            for number, tensor in chosen.items():
                if tensor is not None:
                    states[number].copy_(tensor)

    @in_normal_mode
    def with_rows(self, index: Tensor) -> tuple[dict, dict]:
        """What `take` then exchanges for what there is: row i has what row index[i] has, for another number of rows."""
        chosen = lambda t: None if t is None else t.index_select(0, index.to(t.device))  # noqa: E731
        both = self._conv_states, self._recurrent_states
        return tuple({number: chosen(tensor) for number, tensor in states.items()} for states in both)

    def take(self, states: tuple[dict, dict]) -> None:
        self._conv_states, self._recurrent_states = states

    def memory_with_rows(self, batch: int) -> list[tuple[torch.device, int]]:
        """Bytes of memory that `with_rows` takes for `batch` rows, and where."""
        return [(tensor.device, tensor.nbytes // len(tensor) * batch) for tensor in self.tensors.values()]

    @in_normal_mode
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Holds what `tensors` of another one held."""
        for name, tensor in tensors.items():
            kind, number = name.split(".")
            super().lazy_initialization(**{f"{kind}_states": tensor}, state_idx=int(number))
            self.tensors[name].copy_(tensor)
            self.has_previous_state[int(number)] = True

    def for_compiler(self):
        """The same buffers in transformers' own class, without notes. Not marked as static: every cache shares a program."""
        other = _Plain(number_of_states=self.number_of_states)
        own = {name: value for name, value in vars(self).items() if name in vars(other)}
        vars(other).update(own)
        other.has_previous_state = dict(self.has_previous_state)
        for name, states in (("conv_states", self._conv_states), ("recurrent_states", self._recurrent_states)):
            setattr(other, name, {number: None if t is None else t.detach() for number, t in states.items()})
        return other


class WithStates(_Mixin):
    """A layer of keys and values that has `states` beside them: what transformers asks a layer with states for goes to these."""

    number_of_states = property(lambda self: self.states.number_of_states)
    conv_states = property(lambda self: self.states.conv_states)
    recurrent_states = property(lambda self: self.states.recurrent_states)
    has_previous_state = property(lambda self: self.states.has_previous_state)
    record_past = property(lambda self: self.states.record_past)

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        return self.states.update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs) -> Tensor:
        return self.states.update_recurrent_state(*args, **kwargs)


class HybridLayer(ZigzagLayer, WithStates):
    """A layer that attends and has a state beside its keys."""

    def __init__(self, states: StateLayer, *args):
        super().__init__(*args)
        self.states = states
