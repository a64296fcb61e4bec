"""Operators that change shapes, join and part tensors, or make new ones."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.onnx.dtypes import dtype_of
from rarefy.onnx.operators.signature import Ints, Number, axes_of, axis_of, require

MAX_ELEMENTS = 1 << 27  # of a tensor that an operator makes from sizes alone


def check_elements(shape: Any, operator: str) -> None:
    """Raise ModelError for a shape of too many elements: a small file must not fill the memory."""
    if all(isinstance(n, int) for n in shape):
        count = math.prod(shape)
        require(count <= MAX_ELEMENTS, f"{operator} makes {count:,} elements; at most {MAX_ELEMENTS:,} are computed")


def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    """Reshape to sizes, where 0 keeps a size of the input (unless `allowzero`) and -1 takes what remains."""
    if allowzero:
        return x.reshape(shape)
    return x.reshape([x.shape[d] if isinstance(n, int) and n == 0 else n for d, n in enumerate(shape)])


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    axis = axis_of(axis, x.dim())
    if axis == 1 and x.dim() > 1:
        return torch.flatten(x, 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def transpose(x: Tensor, *, perm: Ints | None = None) -> Tensor:
    return x.permute(tuple(reversed(range(x.dim()))) if perm is None else perm)


def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    if axes is None:
        return torch.squeeze(x)
    for axis in axes_of(axes, x.dim()):
        require(x.shape[axis] == 1, f"Squeeze of an axis of size {x.shape[axis]}")
    return torch.squeeze(x, tuple(axes)) if axes else x


def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    for axis in sorted(axes_of(axes, x.dim() + len(axes))):
        x = x.unsqueeze(axis)
    return x


def concat(*tensors: Tensor, axis: int = 1) -> Tensor:
    return torch.cat(tensors, axis)


def split(
    x: Tensor, split: Ints | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int = 1
) -> tuple[Tensor, ...] | Tensor:
    """Split an axis; without sizes into equal parts, of which the last may be smaller."""
    parts = torch.split(x, -(-x.shape[axis] // outputs), axis) if split is None else torch.split(x, list(split), axis)
    return parts[0] if outputs == 1 else parts


def expand(x: Tensor, shape: Ints) -> Tensor:
    """Broadcast with a shape: 1 keeps a size of the input."""
    check_elements(shape, "Expand")
    rank = max(x.dim(), len(shape))
    old, new = [1] * (rank - x.dim()) + list(x.shape), [1] * (rank - len(shape)) + list(shape)
    return x.expand([a if isinstance(b, int) and b == 1 else b for a, b in zip(old, new)])


def tile(x: Tensor, repeats: Ints, *, opset: int = 13) -> Tensor:
    check_elements([n * r for n, r in zip(x.shape, repeats)], "Tile")
    return x.repeat(tuple(repeats))


def shape_of(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Return the sizes as a tensor: for what needs a tensor of them, or a rank that the file leaves open."""
    return sizes_to_tensor(tuple(x.shape[start:end]))


def size_of(x: Tensor) -> Tensor:
    return sizes_to_tensor(math.prod(x.shape))


def sizes_to_tensor(sizes: Any) -> Tensor:
    """Return sizes, a tuple or a number, as a tensor."""
    if isinstance(sizes, tuple | list):
        if all(isinstance(n, int) for n in sizes):
            return torch.tensor(sizes, dtype=torch.int64)
        return torch.stack([sizes_to_tensor(n) for n in sizes])
    if isinstance(sizes, Tensor):
        return sizes
    kind = {bool: torch.bool, float: torch.float32, torch.SymFloat: torch.float32}.get(type(sizes), torch.int64)
    return torch.scalar_tensor(sizes, dtype=kind)


def to_ints(x: Tensor) -> Any:
    """Return a tensor of integers as a tuple of ints, which torch.export cannot do."""
    return tuple(x.reshape(-1).tolist())


def to_number(x: Tensor) -> Any:
    return x.reshape(()).item()


def constant_of_shape(shape: Ints, *, value: float = 0.0, dtype: int = 1) -> Tensor:
    check_elements(shape, "ConstantOfShape")
    return torch.full(tuple(shape), value, dtype=dtype_of(dtype, "ConstantOfShape"))


def range_(start: Number, limit: Number, delta: Number) -> Tensor:
    dtype = next((x.dtype for x in (start, limit, delta) if isinstance(x, Tensor)), None)
    first, last, step = (x.item() if isinstance(x, Tensor) else x for x in (start, limit, delta))
    if all(type(x) in (int, float) for x in (first, last, step)):
        require(step != 0, "Range with a step of 0")
        check_elements([max(0, math.ceil((last - first) / step))], "Range")
    if dtype is None:
        dtype = torch.float32 if any(isinstance(x, float) for x in (first, last, step)) else torch.int64
    if dtype.is_floating_point:
        count = max(0, math.ceil((last - first) / step))
        return first + step * torch.arange(count, dtype=dtype)
    return torch.arange(first, last, step, dtype=dtype)


def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None]
    return (columns - rows == k).to(x.dtype if dtype is None else dtype_of(dtype, "EyeLike"))


def trilu(x: Tensor, k: Number | None = None, *, upper: int = 1) -> Tensor:
    offset = 0 if k is None else int(k)
    return torch.triu(x, offset) if upper else torch.tril(x, offset)


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    if mode == "CRD":
        return F.pixel_shuffle(x, blocksize)
    N, C, H, W = x.shape
    b = blocksize
    parts = x.reshape(N, b, b, C // (b * b), H, W).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(N, C // (b * b), H * b, W * b)


def space_to_depth(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    if mode == "CRD":
        return F.pixel_unshuffle(x, blocksize)
    N, C, H, W = x.shape
    b = blocksize
    parts = x.reshape(N, C, H // b, b, W // b, b).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(N, C * b * b, H // b, W // b)


def pad(
    x: Tensor, pads: Ints, value: Number | None = None, axes: Ints | None = None, *, mode: str = "constant"
) -> Tensor:
    """Pad axes, or crop them where a pad is negative."""
    rank = x.dim()
    dims = list(range(rank)) if axes is None else axes_of(axes, rank)
    sides = [(0, 0)] * rank
    for i, d in enumerate(dims):
        sides[d] = (pads[i], pads[i + len(dims)])
    check_elements([n + a + b for n, (a, b) in zip(x.shape, sides)], "Pad")
    if mode == "constant":
        fill = 0 if value is None else value.item() if isinstance(value, Tensor) else value
        return F.pad(x, _flat(sides), value=fill)
    require(mode in ("reflect", "edge", "wrap"), f"Pad in the mode {mode!r} is not supported")
    inner = sides[2:]
    if mode != "wrap" and rank in (3, 4) and not any(sides[0] + sides[1]) and all(min(s) >= 0 for s in inner):
        return F.pad(x, _flat(inner), mode="replicate" if mode == "edge" else mode)
    for d, (before, after) in enumerate(sides):
        if before or after:
            x = x.index_select(d, _places(x.shape[d], before, after, mode))
    return x


def _flat(sides: Any) -> list[int]:
    """Return pads in torch's order: from the last dimension, without those that pad nothing."""
    sides = list(sides)
    while len(sides) > 1 and isinstance(sides[0][0], int) and sides[0] == (0, 0):
        sides.pop(0)
    return [n for side in reversed(sides) for n in side]


def _places(size: int, before: int, after: int, mode: str) -> Tensor:
    """Return the indices that a padded axis is read from."""
    places = torch.arange(-before, size + after)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places.remainder(size)
    period = max(2 * (size - 1), 1)
    places = places.remainder(period)
    return torch.where(places >= size, period - places, places)


def center_crop_pad(x: Tensor, shape: Ints, *, axes: Ints | None = None) -> Tensor:
    """Crop or pad the axes about their centres."""
    for axis, n in zip(range(x.dim()) if axes is None else axes_of(axes, x.dim()), shape):
        have = x.shape[axis]
        if n < have:
            x = x.narrow(axis, (have - n) // 2, n)
        elif n > have:
            before = (n - have) // 2
            x = pad(x, (before, n - have - before), axes=(axis,))
    return x


def reverse_sequence(x: Tensor, lengths: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """Reverse the first steps of each sequence."""
    x = x.movedim((time_axis, batch_axis), (0, 1))
    steps, lengths = torch.arange(x.shape[0])[:, None], lengths.to(torch.int64)[None]
    places = torch.where(steps < lengths, lengths - 1 - steps, steps)
    places = places.reshape(*places.shape, *[1] * (x.dim() - 2)).expand(x.shape)
    return x.gather(0, places).movedim((0, 1), (time_axis, batch_axis))


def einsum(*tensors: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation, *tensors)


def identity(x: Tensor) -> Tensor:
    return x


def col2im(
    x: Tensor, image_shape: Ints, block_shape: Ints, *, dilations: Ints | None = None, pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:  # fmt: skip
    """Add up blocks of an image, of any number of dimensions."""
    n = len(image_shape)
    ones = (1,) * n
    dilations, strides, pads = dilations or ones, strides or ones, pads or (0,) * (2 * n)
    channels = x.shape[1] // math.prod(block_shape)
    padded = [s + pads[i] + pads[i + n] for i, s in enumerate(image_shape)]
    places, step = torch.zeros((), dtype=torch.int64), 1
    for i in reversed(range(n)):
        count = (padded[i] - dilations[i] * (block_shape[i] - 1) - 1) // strides[i] + 1
        index = torch.arange(block_shape[i])[:, None] * dilations[i] + torch.arange(count) * strides[i]
        shape = [1] * (2 * n)
        shape[i], shape[n + i] = index.shape
        places = places + index.reshape(shape) * step
        step *= padded[i]
    places = places.reshape(1, 1, -1).expand(x.shape[0], channels, -1)
    out = x.new_zeros(x.shape[0], channels, step).scatter_add(2, places, x.reshape(x.shape[0], channels, -1))
    out = out.reshape(x.shape[0], channels, *padded)
    for i, s in enumerate(image_shape):
        out = out.narrow(2 + i, pads[i], s)
    return out
