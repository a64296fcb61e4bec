"""Resize: each axis is interpolated by itself, with torch's own operators where they mean the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.onnx.operators.shape import check_elements
from rarefy.onnx.operators.signature import Floats, Ints, axes_of, require

HALF_PIXEL = ("half_pixel", "pytorch_half_pixel")


@dataclass(frozen=True)
class Interpolation:
    """How an axis is interpolated: ONNX's attributes."""

    mode: str
    coordinates: str
    nearest: str
    cubic: float
    exclude_outside: bool
    antialias: bool
    outside: float


@dataclass(frozen=True)
class Axis:
    """An axis to interpolate, with its new size, the factor, and the part that is read (0 to 1)."""

    dim: int
    size: int
    scale: float
    start: float = 0.0
    end: float = 1.0


def resize(
    x: Tensor, roi: Floats | None = None, scales: Floats | None = None, sizes: Ints | None = None, *,
    mode: str = "nearest", coordinate_transformation_mode: str | None = None, nearest_mode: str = "round_prefer_floor",
    cubic_coeff_a: float = -0.75, exclude_outside: int = 0, antialias: int = 0, extrapolation_value: float = 0.0,
    axes: Ints | None = None, keep_aspect_ratio_policy: str = "stretch", opset: int = 19,
) -> Tensor:  # fmt: skip
    if opset < 11:  # Resize(x, scales) and Upsample
        roi, scales, nearest_mode = None, scales if roi is None else roi, "floor"
    coordinates = coordinate_transformation_mode or ("asymmetric" if opset < 11 else "half_pixel")
    kind = {"bilinear": "linear", "trilinear": "linear"}.get(mode, mode)
    require(kind in ("nearest", "linear", "cubic"), f"Resize in the mode {mode!r} is not supported")
    method = Interpolation(
        kind, coordinates, nearest_mode, cubic_coeff_a, bool(exclude_outside), bool(antialias), extrapolation_value
    )
    dims = list(range(x.dim())) if axes is None else axes_of(axes, x.dim())
    factors = list(scales) if scales else None
    targets = _targets(x, dims, factors, sizes, keep_aspect_ratio_policy)
    if coordinates == "tf_crop_and_resize" and roi:
        targets = [Axis(t.dim, t.size, t.scale, roi[i], roi[i + len(dims)]) for i, t in enumerate(targets)]
    changed = [t for t in targets if not _is_unchanged(t)]
    check_elements([*(t.size for t in targets)], "Resize")
    return _interpolate(x, changed, method)


def _targets(x: Tensor, dims: list[int], factors: Any, sizes: Any, policy: str) -> list[Axis]:
    if factors is not None:
        return [Axis(d, _scaled(x.shape[d], s), s) for d, s in zip(dims, factors)]
    scales = [n / x.shape[d] for d, n in zip(dims, sizes)]
    if policy == "stretch":
        return [Axis(d, n, s) for d, n, s in zip(dims, sizes, scales)]
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [Axis(d, int(scale * x.shape[d] + 0.5), scale) for d in dims]


def _scaled(size: Any, scale: float) -> Any:
    """Return the size times the factor, without its fraction; an open size stays open for whole factors."""
    if scale == int(scale):
        return size * int(scale)
    return math.floor(size * scale) if isinstance(size, int) else torch.sym_int(size * scale)


def _is_unchanged(axis: Axis) -> bool:
    return axis.scale == 1.0 and (axis.start, axis.end) == (0.0, 1.0)


def _interpolate(x: Tensor, axes: Sequence[Axis], method: Interpolation) -> Tensor:
    if not axes:
        return x.clone()
    if (function := _torch_mode(x, axes, method)) is not None:
        name, corners = function
        spatial = {t.dim: t for t in axes}
        sizes = [spatial[d].size if d in spatial else x.shape[d] for d in range(2, x.dim())]
        return F.interpolate(x, sizes, mode=name, align_corners=corners)
    dtype = x.dtype
    x = x if x.is_floating_point() or method.mode == "nearest" else x.to(torch.float64)
    for axis in axes:
        x = _along(x, axis, method)
    return x if x.dtype == dtype else x.round().to(dtype) if method.mode == "nearest" else x.to(dtype)


def _torch_mode(x: Tensor, axes: Sequence[Axis], method: Interpolation) -> tuple[str, bool | None] | None:
    """Return the mode of torch's interpolation, and whether corners are aligned, if it means the same here."""
    rank = x.dim()
    if method.antialias or method.exclude_outside or rank not in (3, 4, 5) or any(t.dim < 2 for t in axes):
        return None
    if not x.is_floating_point():
        return None
    whole = all(_is_whole(t, x.shape[t.dim]) for t in axes)
    if method.mode == "nearest":
        up = all(t.scale == int(t.scale) for t in axes)
        floor = method.coordinates == "asymmetric" and method.nearest == "floor" and whole
        rounded = method.coordinates in HALF_PIXEL and method.nearest.startswith("round") and up
        return ("nearest", None) if floor or rounded else None
    name = {"linear": {3: "linear", 4: "bilinear", 5: "trilinear"}, "cubic": {4: "bicubic"}}[method.mode].get(rank)
    if name is None or (method.mode == "cubic" and method.cubic != -0.75):
        return None
    if method.coordinates == "align_corners":
        return (name, True) if whole else None
    single = method.coordinates == "pytorch_half_pixel" and any(isinstance(t.size, int) and t.size == 1 for t in axes)
    return (name, False) if method.coordinates in HALF_PIXEL and whole and not single else None


def _is_whole(axis: Axis, size: Any) -> bool:
    """Return whether the new size is the old one times the factor."""
    if axis.scale == int(axis.scale):
        return True
    return isinstance(size, int) and isinstance(axis.size, int) and math.isclose(axis.size, size * axis.scale)


def _along(x: Tensor, axis: Axis, method: Interpolation) -> Tensor:
    """Interpolate one axis: a sum of its slices times weights."""
    size, count = int(x.shape[axis.dim]), int(axis.size)
    places, outside = _coordinates(size, count, axis, method.coordinates)
    indices, weights = _taps(places, size, axis.scale, method)
    if method.mode == "nearest":
        y = x.index_select(axis.dim, torch.from_numpy(indices[np.arange(count), weights.argmax(1)]))
    else:
        matrix = np.zeros((count, size))
        np.add.at(matrix, (np.arange(count)[:, None], indices), weights)
        y = torch.matmul(x.movedim(axis.dim, -1), torch.from_numpy(matrix.T.copy()).to(x.dtype)).movedim(-1, axis.dim)
    if not outside.any():
        return y
    mask = torch.from_numpy(outside).reshape([-1 if d == axis.dim else 1 for d in range(x.dim())])
    return torch.where(mask, torch.tensor(method.outside, dtype=y.dtype), y)


def _coordinates(size: int, count: int, axis: Axis, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Return where each new element lies among the old ones, and which lie outside of them and get a constant."""
    i, length = np.arange(count, dtype=np.float64), axis.scale * size
    half = (i + 0.5) / axis.scale - 0.5
    inside = np.zeros(count, bool)
    if mode == "half_pixel":
        return half, inside
    if mode == "pytorch_half_pixel":
        return (half if length != 1 else np.full(count, -0.5)), inside
    if mode == "half_pixel_symmetric":
        return half + size / 2 * (1 - count / length), inside
    if mode == "asymmetric":
        return i / axis.scale, inside
    if mode == "tf_half_pixel_for_nn":
        return (i + 0.5) / axis.scale, inside
    if mode == "align_corners":
        return (i * (size - 1) / (length - 1) if length != 1 else np.zeros(count)), inside
    require(mode == "tf_crop_and_resize", f"Resize with coordinates {mode!r} is not supported")
    width = (axis.end - axis.start) * (size - 1)
    places = i * width / (length - 1) if length != 1 else np.full(count, width / 2)
    places = places + axis.start * (size - 1)
    return places, (places < 0) | (places > size - 1)


def _taps(places: np.ndarray, size: int, scale: float, method: Interpolation) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices that each new element is a sum of, [count, taps], and their weights."""
    base = np.floor(places).astype(np.int64)
    ratio = places - base
    base, ratio = np.where(ratio == 0, base - 1, base), np.where(ratio == 0, 1.0, ratio)  # the left one of two
    down = min(scale, 1.0) if method.antialias else 1.0
    reach = {"nearest": 1, "linear": 1, "cubic": 2}[method.mode]
    first = math.floor(-reach / down) + 1
    taps = np.arange(first, 2 - first)
    if method.mode == "nearest":
        taps = np.arange(2)
        weights = _nearest(ratio, method.nearest)
    else:
        distance = (taps[None] - ratio[:, None]) * down
        weights = (
            np.clip(1 - np.abs(distance), 0, 1) if method.mode == "linear" else _cubic(np.abs(distance), method.cubic)
        )
        if method.antialias:
            weights = weights / weights.sum(1, keepdims=True)
    indices = base[:, None] + taps[None]
    if method.exclude_outside:
        weights = np.where((indices < 0) | (indices >= size), 0.0, weights)
        total = weights.sum(1, keepdims=True)
        weights = weights / np.where(total == 0, 1.0, total)
    return indices.clip(0, size - 1), weights


def _nearest(ratio: np.ndarray, mode: str) -> np.ndarray:
    """Return the weights of the left and the right element; at the right one itself the ratio is 1."""
    right = {
        "round_prefer_floor": ratio > 0.5,
        "round_prefer_ceil": ratio >= 0.5,
        "floor": ratio == 1,
        "ceil": ratio > 0,
    }
    require(mode in right, f"Resize with the nearest mode {mode!r} is not supported")
    return np.stack([~right[mode], right[mode]], 1).astype(np.float64)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))


def upsample(x: Tensor, scales: Floats, *, mode: str = "nearest") -> Tensor:
    return resize(x, None, scales, mode=mode, opset=9)


def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    name = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return F.grid_sample(x, grid, mode=name, padding_mode=padding_mode, align_corners=bool(align_corners))


def affine_grid(theta: Tensor, size: Ints, *, align_corners: int = 0) -> Tensor:
    return F.affine_grid(theta, list(size), align_corners=bool(align_corners))
