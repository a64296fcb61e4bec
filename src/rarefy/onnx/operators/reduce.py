"""Operators that reduce axes, and sums and products along one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.onnx.operators.signature import Function, Ints, Number, axes_of, axis_of


def reduced(
    function: Function, x: Tensor, axes: Ints | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Reduce axes, by default all, with a function of (x, axes, whether they stay)."""
    if not axes and noop_with_empty_axes:
        return function(x, (), True)
    dims = axes_of(axes, x.dim()) if axes else list(range(x.dim()))
    return function(x, tuple(dims), bool(keepdims))


def sum_(x: Tensor, dims: Any, keep: bool) -> Tensor:
    return x.sum(dims, keepdim=keep, dtype=x.dtype) if dims else x


def mean(x: Tensor, dims: Any, keep: bool) -> Tensor:
    if not dims or x.is_floating_point():
        return x.mean(dims, keepdim=keep) if dims else x
    total, count = x.sum(dims, keepdim=keep), 1
    for d in dims:
        count *= x.shape[d]
    return torch.div(total, count, rounding_mode="trunc").to(x.dtype)


def max_(x: Tensor, dims: Any, keep: bool) -> Tensor:
    return _extreme(x, dims, keep, largest=True)


def min_(x: Tensor, dims: Any, keep: bool) -> Tensor:
    return _extreme(x, dims, keep, largest=False)


def _extreme(x: Tensor, dims: Any, keep: bool, largest: bool) -> Tensor:
    """Return the largest or smallest element; of none the smallest or largest number of the type."""
    if not dims:
        return x
    if any(isinstance(x.shape[d], int) and x.shape[d] == 0 for d in dims):
        shape = [1 if d in dims else n for d, n in enumerate(x.shape)]
        shape = shape if keep else [n for d, n in enumerate(x.shape) if d not in dims]
        if x.dtype == torch.bool:
            return torch.full(shape, not largest, dtype=torch.bool)
        info = torch.finfo(x.dtype) if x.is_floating_point() else torch.iinfo(x.dtype)
        limit = torch.inf if x.is_floating_point() else info.max
        return torch.full(shape, (-limit if x.is_floating_point() else info.min) if largest else limit, dtype=x.dtype)
    return x.amax(dims, keepdim=keep) if largest else x.amin(dims, keepdim=keep)


def prod(x: Tensor, dims: Any, keep: bool) -> Tensor:
    for d in sorted(dims, reverse=True):
        x = x.prod(d, keepdim=keep, dtype=x.dtype)
    return x


def l1(x: Tensor, dims: Any, keep: bool) -> Tensor:
    return sum_(x.abs(), dims, keep)


def l2(x: Tensor, dims: Any, keep: bool) -> Tensor:
    return sum_(x * x, dims, keep).sqrt().to(x.dtype)


def sum_square(x: Tensor, dims: Any, keep: bool) -> Tensor:
    return sum_(x * x, dims, keep)


def log_sum(x: Tensor, dims: Any, keep: bool) -> Tensor:
    return sum_(x, dims, keep).log()


def log_sum_exp(x: Tensor, dims: Any, keep: bool) -> Tensor:
    return torch.logsumexp(x, dims, keepdim=keep) if dims else x


def arg_extreme(x: Tensor, largest: bool, axis: int, keepdims: int, select_last_index: int) -> Tensor:
    """Return the place of the largest or smallest element, the first or the last of equal ones."""
    find = torch.argmax if largest else torch.argmin
    if not select_last_index:
        return find(x, axis, keepdim=bool(keepdims))
    last = x.shape[axis] - 1
    return last - find(x.flip(axis), axis, keepdim=bool(keepdims))


def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return arg_extreme(x, True, axis, keepdims, select_last_index)


def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return arg_extreme(x, False, axis, keepdims, select_last_index)


def cumulative(function: Function, x: Tensor, axis: Number, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Add or multiply along an axis; exclusive: without the element itself."""
    d = axis_of(int(axis), x.dim())
    x = x.flip(d) if reverse else x
    if exclusive:
        first = torch.full_like(x.narrow(d, 0, 1), 0 if function is torch.cumsum else 1)
        x = torch.cat([first, x.narrow(d, 0, x.shape[d] - 1)], d)
    x = function(x, d, dtype=x.dtype)
    return x.flip(d) if reverse else x


def lp_normalization(x: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    norm = x.abs().sum(axis, keepdim=True) if p == 1 else (x * x).sum(axis, keepdim=True).sqrt()
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


def top_k(
    x: Tensor, k: Number, *, axis: int = -1, largest: int = 1, sorted: int = 1, outputs: int = 2
) -> tuple[Tensor, Tensor]:
    """Return the largest or smallest elements and their places; of equal elements the first."""
    count = k if isinstance(k, int) else int(k)
    values, places = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)
