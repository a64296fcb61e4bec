"""Weights that several processes hold together (FSDP2): as one tensor, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sharded(tensor: Any) -> bool:
    """Return whether a tensor is spread over processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """Return all of a tensor, on every process; itself where it is not spread.

    >>> whole(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    return tensor.full_tensor() if sharded(tensor) else tensor


def spread_as(full: Tensor, tensor: Any) -> Tensor:
    """Return a tensor that is whole on every process as `tensor` is spread."""
    if not sharded(tensor):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)


def everyones(tensor: Tensor) -> Tensor:
    """Return the mean over processes of what each has, as DDP and FSDP take gradients; itself where there is one."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized() and group.get_world_size() > 1):
        return tensor
    total = tensor.detach().clone()
    group.all_reduce(total)
    return total / group.get_world_size()
