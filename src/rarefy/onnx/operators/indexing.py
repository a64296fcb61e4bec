"""Operators that read and write parts of tensors by index."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rarefy.onnx.operators.shape import check_elements
from rarefy.onnx.operators.signature import Ints, Number, axes_of, axis_of, require


def from_front(indices: Tensor, size: int) -> Tensor:
    """Return indices counted from the first element."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Return the slices of an axis that indices of any shape name."""
    axis = axis_of(axis, x.dim())
    indices = from_front(indices, x.shape[axis])
    picked = x.index_select(axis, indices.reshape(-1))
    return picked if indices.dim() == 1 else picked.reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    axis = axis_of(axis, x.dim())
    return x.gather(axis, from_front(indices, x.shape[axis]))


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Return the slices that the last dimension of the indices names."""
    batch = x.shape[:batch_dims]
    count = math.prod(batch)
    flat = indices.to(torch.int64).reshape(count, -1, indices.shape[-1])
    data = x.reshape(count, *x.shape[batch_dims:])
    rows = torch.arange(count)[:, None].expand(-1, flat.shape[1])
    picked = data[(rows, *flat.unbind(-1))]
    return picked.reshape((*indices.shape[:-1], *x.shape[batch_dims + indices.shape[-1] :]))


def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    axis = axis_of(axis, x.dim())
    indices = from_front(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, indices, updates)
    return x.scatter_reduce(axis, indices, updates, _reduction(reduction))


def _reduction(name: str) -> str:
    known = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    require(name in known, f"Scatter with the reduction {name!r} is not supported")
    return known[name]


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """Write slices to the places that the last dimension of the indices names."""
    depth = indices.shape[-1]
    places = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for d in range(depth):
        places = places * x.shape[d] + from_front(indices[..., d], x.shape[d])
    rows = x.reshape(math.prod(x.shape[:depth]), -1)
    new = updates.reshape(-1, rows.shape[1])
    where = places.reshape(-1)
    if reduction == "none":
        return rows.index_copy(0, where, new).reshape(x.shape)
    spread = where[:, None].expand(-1, rows.shape[1])
    return rows.scatter_reduce(0, spread, new, _reduction(reduction)).reshape(x.shape)


def slice_(x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None) -> Tensor:
    """Return a part of some axes; a negative step goes backwards."""
    for i, axis in enumerate(range(len(starts)) if axes is None else axes_of(axes, x.dim())):
        step = 1 if steps is None else steps[i]
        if step > 0:
            part = (slice(None),) * axis + (slice(starts[i], ends[i], step),)
            x = x[part]
        else:
            x = x.index_select(axis, torch.arange(*slice(starts[i], ends[i], step).indices(x.shape[axis])))
    return x


def compress(x: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    if axis is None:
        x, axis = x.reshape(-1), 0
    places = torch.nonzero(condition)[:, 0]
    return x.index_select(axis, places[places < x.shape[axis]])


def non_zero(x: Tensor) -> Tensor:
    return torch.nonzero(x).T


def one_hot(indices: Tensor, depth: Number, values: Tensor, *, axis: int = -1) -> Tensor:
    count = int(depth)
    check_elements([*indices.shape, count], "OneHot")
    axis = axis_of(axis, indices.dim() + 1)
    places = torch.arange(count).reshape([-1 if d == axis else 1 for d in range(indices.dim() + 1)])
    hits = from_front(indices, count).unsqueeze(axis) == places
    return torch.where(hits, values[1], values[0])


def unique(x: Tensor, *, axis: int | None = None, sorted: int = 1, outputs: int = 1) -> Any:
    """Return the different slices of an axis, their first places, where each slice went, and their counts."""
    data = x.reshape(-1) if axis is None else x
    d = 0 if axis is None else axis_of(axis, x.dim())
    values, inverse, counts = torch.unique(data, sorted=True, return_inverse=True, return_counts=True, dim=d)
    first = torch.full((len(counts),), data.shape[d], dtype=torch.int64)
    first = first.scatter_reduce(0, inverse, torch.arange(data.shape[d]), "amin")
    if not sorted:
        order = torch.argsort(first)
        back = torch.argsort(order)
        values, first, counts, inverse = values.index_select(d, order), first[order], counts[order], back[inverse]
    return values if outputs == 1 else (values, first, inverse, counts)[:outputs]


def tensor_scatter(
    cache: Tensor, update: Tensor, write_indices: Tensor | None = None, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """Write into a cache from a place of each batch on."""
    axis = axis_of(axis, cache.dim())
    starts = torch.zeros(cache.shape[0], dtype=torch.int64) if write_indices is None else write_indices
    places = starts.to(torch.int64)[:, None] + torch.arange(update.shape[axis])
    if mode == "circular":
        places = places % cache.shape[axis]
    shape = [places.shape[0], *(places.shape[1] if d == axis else 1 for d in range(1, cache.dim()))]
    return cache.scatter(axis, places.reshape(shape).expand(update.shape), update)
