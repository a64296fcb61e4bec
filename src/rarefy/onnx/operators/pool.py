"""Pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.onnx.operators.conv import CONV, torch_pads, window_pads
from rarefy.onnx.operators.signature import Ints, require

MAX_POOL: tuple[Any, ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
AVERAGE_POOL: tuple[Any, ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _sides(x: Tensor, kernel: Any, strides: Any, dilations: Any, pads: Any, auto_pad: str, ceil: int) -> Any:
    """Return the pads of each axis, and how much more a last window that is cut off reaches beyond them."""
    sides = window_pads(x.shape[2:], kernel, strides, dilations, pads, auto_pad)
    beyond = []
    for size, k, s, d, (a, b) in zip(x.shape[2:], kernel, strides, dilations, sides):
        reach = d * (k - 1) + 1
        count = (size + a + b - reach) // s + 1
        if ceil:
            count = -((reach - size - a - b) // s) + 1
            count = count - 1 if (count - 1) * s >= size + a else count  # a window begins in the input
        beyond.append(max(0, (count - 1) * s + reach - size - a - b) if ceil else 0)
    return sides, beyond


def _checked(name: str, kernel_shape: Ints, strides: Ints | None, dilations: Ints | None) -> tuple[int, Ints, Ints]:
    """Return the number of dimensions, which torch must support, and steps with their defaults."""
    n = len(kernel_shape)
    require(0 < n < 4, f"{name} of {n} dimensions is not supported")
    return n, strides or (1,) * n, dilations or (1,) * n


def _plain(sides: Any, beyond: Any, kernel_shape: Ints) -> bool:
    """Return whether torch's pooling pads alike: equally on both sides, by half a window at most."""
    return all(a == b and not c and 2 * a <= k for (a, b), c, k in zip(sides, beyond, kernel_shape))


def max_pool(
    x: Tensor, *, kernel_shape: Ints, auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: Ints | None = None,
    pads: Ints | None = None, storage_order: int = 0, strides: Ints | None = None, outputs: int = 1,
) -> Any:  # fmt: skip
    """Return the largest element of each window, and its place in the whole tensor."""
    n, strides, dilations = _checked("MaxPool", kernel_shape, strides, dilations)
    sides, beyond = _sides(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    plain = _plain(sides, [0] * n, kernel_shape)  # torch too leaves out windows that begin behind the input
    dtype, values = x.dtype, x
    if not x.is_floating_point() and dtype not in (torch.int64, torch.int32):
        values = x.to(torch.int32)
    if plain:
        padding = [a for a, _ in sides]
    else:
        low = -math.inf if x.is_floating_point() else torch.iinfo(values.dtype).min
        values = F.pad(values, torch_pads([(a, b + c) for (a, b), c in zip(sides, beyond)]), value=low)
        padding = [0] * n
    options = {"ceil_mode": plain and bool(ceil_mode), "return_indices": outputs > 1}
    pooled = MAX_POOL[n - 1](values, kernel_shape, strides, padding, dilations, **options)
    if outputs == 1:
        return pooled if pooled.dtype == dtype else pooled.to(dtype)
    before = [0] * n if plain else [a for a, _ in sides]
    return pooled[0].to(dtype), _places(pooled[1], list(values.shape[2:]), list(x.shape), before, storage_order)


def _places(places: Tensor, padded_sizes: list[int], shape: list[int], before: list[int], storage_order: int) -> Tensor:
    """Return indices into a whole tensor, from those into each padded channel."""
    coordinates, rest = [], places
    for size in reversed(padded_sizes):
        coordinates.insert(0, rest % size)
        rest = rest // size
    order = list(range(len(coordinates)))
    out, step = torch.zeros_like(places), 1
    for d in order if storage_order else reversed(order):
        out = out + (coordinates[d] - before[d]) * step
        step *= shape[2 + d]
    channels = torch.arange(shape[0] * shape[1]).reshape(shape[0], shape[1], *[1] * len(order))
    return out + channels * step


def average_pool(
    x: Tensor, *, kernel_shape: Ints, auto_pad: str = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0,
    dilations: Ints | None = None, pads: Ints | None = None, strides: Ints | None = None,
) -> Tensor:  # fmt: skip
    """Return the mean of each window; `count_include_pad`: zeros of the padding count."""
    n, strides, dilations = _checked("AveragePool", kernel_shape, strides, dilations)
    sides, beyond = _sides(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    if _plain(sides, beyond, kernel_shape) and set(dilations) == {1}:
        padding = [a for a, _ in sides]
        return AVERAGE_POOL[n - 1](x, kernel_shape, strides, padding, count_include_pad=bool(count_include_pad))
    ones = torch.ones([1, 1, *x.shape[2:]], dtype=x.dtype)
    inside, outside = torch_pads(sides), torch_pads([(0, c) for c in beyond])
    counted = F.pad(ones, inside, value=1.0 if count_include_pad else 0.0)
    sums = [_window_sums(F.pad(t, outside), kernel_shape, strides, dilations) for t in (F.pad(x, inside), counted)]
    return sums[0] / sums[1]


def _window_sums(x: Tensor, kernel: Ints, strides: Ints, dilations: Ints) -> Tensor:
    weight = torch.ones((1, 1, *kernel), dtype=x.dtype)
    flat = CONV[len(kernel) - 1](x.reshape(-1, 1, *x.shape[2:]), weight, None, strides, 0, dilations)
    return flat.reshape(*x.shape[:2], *flat.shape[2:])


def lp_pool(
    x: Tensor, *, kernel_shape: Ints, auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: Ints | None = None,
    p: int = 2, pads: Ints | None = None, strides: Ints | None = None,
) -> Tensor:  # fmt: skip
    n = len(kernel_shape)
    strides, dilations = strides or (1,) * n, dilations or (1,) * n
    sides, beyond = _sides(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    x = F.pad(x.abs() ** p, torch_pads([(a, b + c) for (a, b), c in zip(sides, beyond)]))
    return _window_sums(x, kernel_shape, strides, dilations) ** (1 / p)


def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    return (x.abs() ** p).sum(tuple(range(2, x.dim())), keepdim=True) ** (1 / p)


def max_unpool(
    x: Tensor, indices: Tensor, output_shape: Ints | None = None, *, kernel_shape: Ints, pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:  # fmt: skip
    """Put the elements of a MaxPool back to their places; the others are zero."""
    n = len(kernel_shape)
    strides, pads = strides or (1,) * n, pads or (0,) * (2 * n)
    shape = [
        (size - 1) * s - a - b + k for size, s, k, a, b in zip(x.shape[2:], strides, kernel_shape, pads[:n], pads[n:])
    ]
    inferred = [*x.shape[:2], *shape]
    out = torch.zeros(math.prod(inferred), dtype=x.dtype)
    out = out.scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(inferred)
    if output_shape is None or list(output_shape) == inferred:
        return out
    return F.pad(out, torch_pads([(0, b - a) for a, b in zip(inferred[2:], output_shape[2:])]))
