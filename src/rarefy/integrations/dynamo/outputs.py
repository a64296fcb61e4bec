"""Outputs of the engine must be as eager torch's: the same strides, and memory of their own or of the same tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rarefy.common.errors import ModelError

Repair = Callable[[Tensor], Tensor]
Run = Callable[[Sequence[Tensor]], Sequence[Any]]


def clones(values: Sequence[Any]) -> list[Any]:
    """Return copies of tensors, with their strides where those are dense, and other values as they are."""
    return [t.detach().clone() if isinstance(t, Tensor) else t for t in values]


def repairs(run: Run, wanted: Sequence[Any], read: Sequence[Tensor], weights: Sequence[Tensor]) -> dict[int, Repair]:
    """Return what must happen to outputs of the engine so that they are as eager torch's, by position.

    Args:
        run: calls the engine with tensors.
        wanted: eager torch's outputs.
        read: the tensors that eager torch was called with.
        weights: the parameters and buffers that it was called with.

    Raises:
        ModelError: if outputs share memory with other tensors than eager torch's, or are of other types.
    """
    first = clones(read)
    outputs, again = run(first), run(clones(read))
    if len(outputs) != len(wanted):
        raise ModelError(f"expected {len(wanted)} outputs, got {len(outputs)}")
    shared = shared_memory(outputs, [*first, *weights])
    if shared != shared_memory(wanted, [*read, *weights]):
        raise ModelError("its outputs share memory with inputs or with each other")
    num_others = len(first) + len(weights)
    owners = {place[0] for place in shared if place is not None}
    result: dict[int, Repair] = {}
    for i, (ours, theirs) in enumerate(zip(outputs, wanted)):
        if not isinstance(theirs, Tensor):
            if type(ours) is not type(theirs) or ours != theirs:
                raise ModelError(f"output {i}: expected {theirs!r}, got {ours!r}")
            continue
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            raise ModelError(f"output {i} has another type or shape than in eager torch")
        place = shared[i]
        from_caller = place is not None and place[0] < num_others
        if not same_strides(ours, theirs):
            result[i] = _restore(ours, theirs, i)
        elif not from_caller and _address(ours) == _address(again[i]):
            result[i] = torch.clone  # a value that all calls share
        if i in result and (place is not None or num_others + i in owners):  # copies would no longer share memory
            raise ModelError(f"output {i} shares memory with another output, and would have to be copied")
    return result


def shared_memory(outputs: Sequence[Any], others: Sequence[Tensor]) -> list[tuple[int, int] | None]:
    """Return for each output the first other tensor or earlier output in the same memory, and its offset there.

    >>> x = torch.zeros(4)
    >>> shared_memory([x[1:], x + 1], [torch.ones(2), x])
    [(1, 1), None]
    """
    owners: dict[int, int] = {}
    for i, t in enumerate(others):
        owners.setdefault(_address(t), i)
    places: list[tuple[int, int] | None] = []
    for i, t in enumerate(outputs, len(others)):
        owner = owners.setdefault(_address(t), i) if isinstance(t, Tensor) and t.numel() else i
        places.append(None if owner == i else (owner, int(t.storage_offset())))
    return places


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one shape have equal strides; those of single entries do not count."""
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride()))


def _restore(ours: Tensor, theirs: Tensor, position: int) -> Repair:
    """Return a function that gives an output the order of dimensions in memory that it has in eager torch."""
    order = sorted(range(theirs.dim()), key=lambda d: (-theirs.stride(d), d))
    back = [order.index(d) for d in range(len(order))]

    def restore(t: Tensor) -> Tensor:
        return t.permute(order).contiguous().permute(back)

    if not same_strides(restore(ours), theirs):  # a part of a larger tensor
        raise ModelError(f"output {position} has other strides than in eager torch")
    return restore
