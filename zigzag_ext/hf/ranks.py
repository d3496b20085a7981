"""Tensor parallelism: processes ("ranks") that run one program, each with its part of the weights and of the heads.

A forward waits for all ranks in every layer, so what decides which forwards are run must be decided alike everywhere. What a rank
finds out by itself (free memory, addresses, the clock, random numbers) is agreed on here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import StoppingCriteria
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StopStringCriteria

_ALIKE = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)  # look at the tokens, which all ranks have


@torch.no_grad()  # where gradients are recorded, a DTensor's local part is made anew for each call
def local_tensors(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Parameters and buffers, each with what this process holds of it: a DTensor's local part, any other tensor itself.

    A DTensor has no memory of its own: its `data_ptr()` is 0, and it does not count what is written to its local part.
    """
    tensors = (tensor for group in (model.parameters(), model.buffers()) for tensor in group)
    return [(tensor, tensor.to_local() if hasattr(tensor, "to_local") else tensor) for tensor in tensors]


class _LostRank(RuntimeError):
    """Another rank has ended or does not answer."""


class Ranks:
    """The ranks that have one model. Each method is a collective: all ranks call it, at the same place of the program."""

    def __init__(self, group: "dist.ProcessGroup", device: torch.device):
        self.group, self.device = group, device  # device: where the group's backend takes tensors from

    @classmethod
    def of(cls, model: nn.Module) -> "Ranks | None":
        """None: the model is in one piece, or not shared out by transformers' tensor parallelism."""
        if (getattr(model, "_tp_size", None) or 1) == 1:
            return None
        mesh = model._device_mesh
        return cls((mesh["tp"] if mesh.ndim > 1 else mesh).get_group(), model.device)

    def least(self, value: int) -> int:
        """The least value of any rank."""
        return self._reduced(value, dist.ReduceOp.MIN)

    def any(self, holds: bool) -> bool:
        """Whether it holds on one rank or more."""
        return bool(self._reduced(int(holds), dist.ReduceOp.MAX))

    def same(self, value: int) -> bool:
        """Whether all ranks have this value."""
        return self.least(value) == self._reduced(value, dist.ReduceOp.MAX)

    def of_first(self, tensor: Tensor) -> Tensor:
        """That of the first rank, on the device of this one's; shapes and dtypes are the same everywhere."""
        sent = tensor.to(self.device, copy=True).contiguous()
        with self.together():
            dist.broadcast(sent, group_src=0, group=self.group)
            return sent.to(tensor.device)

    def draw_alike(self) -> None:
        """Random numbers come as on the first rank from now on, on the CPU and on the model's GPU."""
        torch.set_rng_state(self.of_first(torch.get_rng_state()))
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(self.of_first(torch.cuda.get_rng_state(self.device)), self.device)

    def criterion(self, criterion: Callable) -> Callable:
        """A stopping criterion that says the same on all ranks."""
        return criterion if type(criterion) in _ALIKE else _OfFirstRank(self, criterion)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what waits for other ranks. Raises RuntimeError if one of them has ended or does not answer."""
        try:
            yield
        except _LostRank:
            raise
        except RuntimeError as error:
            if isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo's are plain RuntimeErrors, with its source file
                raise _LostRank(
                    f"tensor parallelism: another of the {self.group.size()} processes that share the model out has ended or "
                    f"does not answer, so this one (rank {self.group.rank()}) cannot go on; its own messages say why. {error}"
                ) from error
            raise

    def mean(self, tensor: Tensor) -> Tensor:
        """Of the ranks' tensors, which have one shape, on the device of this one's."""
        sent = tensor.to(self.device, copy=True).contiguous()
        with self.together():
            dist.all_reduce(sent, group=self.group)
            return sent.div_(self.group.size()).to(tensor.device)

    def _reduced(self, value: int, how) -> int:
        tensor = torch.tensor(value, dtype=torch.int64, device=self.device)
        with self.together():
            dist.all_reduce(tensor, op=how, group=self.group)
            return int(tensor)


class _OfFirstRank(StoppingCriteria):
    """What a criterion says on the first rank: one that looks at a clock or asks a user would stop the ranks one by one."""

    def __init__(self, ranks: Ranks, criterion: Callable):
        self.ranks, self.criterion = ranks, criterion

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        done = torch.as_tensor(self.criterion(input_ids, scores, **kwargs), dtype=torch.bool, device=input_ids.device)
        return self.ranks.of_first(done.expand(len(input_ids)))
