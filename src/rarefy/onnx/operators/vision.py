"""Boxes and regions of images. How much they return depends on values, so torch.export cannot follow them."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.onnx.operators.signature import Number, require


def non_max_suppression(
    boxes: Tensor, scores: Tensor, max_output_boxes_per_class: Number | None = None,
    iou_threshold: Number | None = None, score_threshold: Number | None = None, *, center_point_box: int = 0,
) -> Tensor:  # fmt: skip
    """Return [batch, class, box] of the boxes with the highest scores that do not overlap."""
    max_boxes = 0 if max_output_boxes_per_class is None else int(max_output_boxes_per_class)
    overlap = 0.0 if iou_threshold is None else float(iou_threshold)
    corners = _corners(boxes.float(), bool(center_point_box))
    picked: list[tuple[int, int, int]] = []
    for batch in range(scores.shape[0]):
        for kind in range(scores.shape[1]):
            values = scores[batch, kind]
            order = torch.sort(values, descending=True, stable=True).indices
            if score_threshold is not None:
                order = order[values[order] > float(score_threshold)]
            picked += [(batch, kind, box) for box in _separate(corners[batch], order, overlap, max_boxes)]
    return torch.tensor(picked, dtype=torch.int64).reshape(-1, 3)


def _corners(boxes: Tensor, centered: bool) -> Tensor:
    """Return boxes as [..., (y or x of the low corner, of the high corner)]."""
    a, b, c, d = boxes.unbind(-1)
    if centered:
        return torch.stack([b - d / 2, a - c / 2, b + d / 2, a + c / 2], -1)
    return torch.stack([torch.minimum(a, c), torch.minimum(b, d), torch.maximum(a, c), torch.maximum(b, d)], -1)


def _separate(corners: Tensor, order: Tensor, overlap: float, max_boxes: int) -> list[int]:
    """Return the first boxes in an order that overlap none before them by more than a share of their union."""
    selected: list[int] = []
    sizes = corners[:, 2:] - corners[:, :2]
    areas = sizes[:, 0] * sizes[:, 1]
    while len(order) and len(selected) < max_boxes:
        first = int(order[0])
        selected.append(first)
        low = torch.maximum(corners[first, :2], corners[order, :2])
        high = torch.minimum(corners[first, 2:], corners[order, 2:])
        shared = (high - low).clamp(min=0).prod(-1)
        union = areas[first] + areas[order] - shared
        share = torch.where((shared > 0) & (union > 0), shared / union, torch.zeros_like(shared))
        rest = share <= overlap
        rest[0] = False
        order = order[rest]
    return selected


def roi_align(
    x: Tensor, rois: Tensor, batch_indices: Tensor, *, coordinate_transformation_mode: str | None = None,
    mode: str = "avg", output_height: int = 1, output_width: int = 1, sampling_ratio: int = 0,
    spatial_scale: float = 1.0, opset: int = 16,
) -> Tensor:  # fmt: skip
    """Pool regions of images, read between pixels by bilinear interpolation."""
    require(mode in ("avg", "max"), f"RoiAlign in the mode {mode!r} is not supported")
    half = (coordinate_transformation_mode or ("half_pixel" if opset >= 16 else "output_half_pixel")) == "half_pixel"
    pooled = []
    for region, batch in zip((rois * spatial_scale - (0.5 if half else 0.0)).tolist(), batch_indices.tolist()):
        axes = []
        for start, end, count, size in (
            (region[1], region[3], output_height, x.shape[2]),
            (region[0], region[2], output_width, x.shape[3]),
        ):
            length = end - start if half else max(end - start, 1.0)
            samples = sampling_ratio if sampling_ratio > 0 else int(-(-length / count // 1))
            axes.append(_weights(start, length, count, max(samples, 0), size))
        pooled.append(_pool_region(x[int(batch)], axes[0], axes[1], mode))
    return torch.stack(pooled) if pooled else x.new_zeros(0, x.shape[1], output_height, output_width)


def _weights(start: float, length: float, count: int, samples: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the pixels before and after [count, samples] places along an axis, with their weights."""
    bins = torch.arange(count, dtype=torch.float64)[:, None]
    inner = (torch.arange(samples, dtype=torch.float64) + 0.5) / max(samples, 1)
    places = start + (bins + inner) * (length / count)
    inside = (places >= -1) & (places <= size)
    places = places.clamp(min=0)
    low = places.floor().clamp(max=size - 1)
    places = torch.where(low >= size - 1, low, places)
    high = (low + 1).clamp(max=size - 1)
    part = places - low
    return low.long(), high.long(), (1 - part) * inside, part * inside


def _pool_region(image: Tensor, rows: tuple[Tensor, ...], columns: tuple[Tensor, ...], mode: str) -> Tensor:
    """Pool one region [channels, height, width]."""
    parts = []
    for row, row_weight in ((rows[0], rows[2]), (rows[1], rows[3])):
        for column, column_weight in ((columns[0], columns[2]), (columns[1], columns[3])):
            weight = row_weight[:, :, None, None] * column_weight
            parts.append(image[:, row[:, :, None, None], column] * weight.to(image.dtype))
    samples = max(rows[0].shape[1] * columns[0].shape[1], 1)
    if mode == "avg":
        return torch.stack(parts).sum(0).sum((2, 4)) / samples
    return torch.stack(parts).amax(0).amax((2, 4))
