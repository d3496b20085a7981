"""The columns of a chunk in the order in which the ops take them: those to skip first."""

import torch
from torch import Tensor

from ..attention.store import in_normal_mode

Copies = dict[torch.device, Tensor]  # one tensor by where it is, empty if there is none


def copy_on(copies: Copies, device: torch.device) -> Tensor | None:
    """The tensor of which `copies` are, on `device`; None if there is none."""
    if copies and device not in copies:
        copies[device] = in_normal_mode(next(iter(copies.values())).to)(device)
    return copies.get(device)


def is_mixed(hidden: Tensor) -> Tensor:
    """0-d bool: whether any row of `hidden` [batch, columns] has a column to skip behind another one."""
    return (hidden[:, 1:] & ~hidden[:, :-1]).any()


def in_order(t: Tensor, orders: Copies) -> Tensor:
    """t [batch, heads, columns, head_dim] in the order [batch, columns] int64 of which `orders` are copies."""
    order = copy_on(orders, t.device)
    return t if order is None else t.gather(2, order[:, None, :, None].expand_as(t))


def back_in_order(t: Tensor, orders: Copies) -> Tensor:
    """What `in_order` takes t from."""
    order = copy_on(orders, t.device)
    return t if order is None else torch.empty_like(t).scatter_(2, order[:, None, :, None].expand_as(t), t)
