"""Normalizations, with weights that are computed or of forms that no torch module has."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.onnx.dtypes import dtype_of
from rarefy.onnx.operators.signature import Ints, axes_of, axis_of, require


def batch_norm(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor, *, epsilon: float = 1e-5, momentum: float = 0.9,
    training_mode: int = 0, spatial: int = 1, opset: int = 15, outputs: int = 1,
) -> Any:  # fmt: skip
    require(spatial == 1, "BatchNormalization over single elements (spatial = 0) is not supported")
    if not training_mode:
        require(outputs == 1, "BatchNormalization with several outputs is for training")
        return F.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)
    dims = [0, *range(2, x.dim())]
    now, spread = x.mean(dims), x.var(dims, unbiased=False)
    y = F.batch_norm(x, now, spread, scale, bias, False, 0.0, epsilon)
    if outputs == 1:
        return y
    return y, mean * momentum + now * (1 - momentum), var * momentum + spread * (1 - momentum)


def instance_norm(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


def group_norm(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1,
    opset: int = 21,
) -> Tensor:  # fmt: skip
    """Normalize groups of channels; before version 21 the scale and bias were those of whole groups."""
    if opset < 21:
        count = x.shape[1] // num_groups
        scale, bias = scale.repeat_interleave(count), bias.repeat_interleave(count)
    return F.group_norm(x, num_groups, scale, bias, epsilon)


def layer_norm(
    x: Tensor, scale: Tensor | None = None, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5,
    stash_type: int = 1, outputs: int = 1,
) -> Any:  # fmt: skip
    """Normalize over all axes from one on; return the mean and the inverse deviation too if asked for."""
    axis = axis_of(axis, x.dim())
    sizes = list(x.shape[axis:])
    if outputs == 1 and x.dtype == torch.float32:
        weight, shift = (t if t is None or list(t.shape) == sizes else t.expand(sizes) for t in (scale, bias))
        return F.layer_norm(x, sizes, weight, shift, epsilon)
    dims, wide = tuple(range(axis, x.dim())), x.to(dtype_of(stash_type, "LayerNormalization"))
    mean = wide.mean(dims, keepdim=True)
    inverse = ((wide - mean).square().mean(dims, keepdim=True) + epsilon).rsqrt()
    y = ((wide - mean) * inverse).to(x.dtype)
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    return y if outputs == 1 else (y, mean, inverse)[:outputs]


def rms_norm(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    dims = tuple(range(axis_of(axis, x.dim()), x.dim()))
    wide = x.to(dtype_of(stash_type, "RMSNormalization"))
    y = (wide * (wide.square().mean(dims, keepdim=True) + epsilon).rsqrt()).to(x.dtype)
    return y * scale


def skip_layer_norm(
    x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor | None = None, bias: Tensor | None = None, *,
    epsilon: float = 1e-12, outputs: int = 1,
) -> Any:  # fmt: skip
    """Normalize a sum, as ONNX Runtime fuses it; the fourth output is the sum."""
    total = x + skip if bias is None else x + skip + bias
    y = F.layer_norm(total, gamma.shape, gamma, beta, epsilon)
    return y if outputs == 1 else (y, None, None, total)[:outputs]


def skip_rms_norm(
    x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None, *, epsilon: float = 1e-5, outputs: int = 1
) -> Any:
    """Normalize a sum by its root mean square, as ONNX Runtime fuses it; the fourth output is the sum."""
    total = x + skip if bias is None else x + skip + bias
    y = rms_norm(total, gamma, epsilon=epsilon)
    return y if outputs == 1 else (y, None, None, total)[:outputs]


def embed_layer_norm(
    input_ids: Tensor, segment_ids: Tensor | None, words: Tensor, positions: Tensor, segments: Tensor | None,
    gamma: Tensor, beta: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None, *,
    epsilon: float = 1e-12, mask_index_type: int = 0, outputs: int = 2,
) -> Any:  # fmt: skip
    """Add up embeddings and normalize them, as ONNX Runtime fuses it."""
    length = input_ids.shape[1]
    total = F.embedding(input_ids, words)
    total = total + (positions[:length] if position_ids is None else F.embedding(position_ids, positions))
    if segment_ids is not None and segments is not None:
        total = total + F.embedding(segment_ids, segments)
    y = F.layer_norm(total, gamma.shape, gamma, beta, epsilon)
    if outputs == 1:
        return y
    counts = torch.zeros(input_ids.shape[0], dtype=torch.int32) if mask is None else mask.sum(1, dtype=torch.int32)
    return (y, counts, total)[:outputs]


def lrn(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """Divide by the energy of the channels around each."""
    squares = x.square().reshape(x.shape[0], 1, x.shape[1], -1)
    squares = F.pad(squares, (0, 0, (size - 1) // 2, size // 2))
    energy = F.avg_pool2d(squares, (size, 1), stride=1).reshape(x.shape)
    return x / (energy * alpha + bias) ** beta


def mean_variance_norm(x: Tensor, *, axes: Ints = (0, 2, 3)) -> Tensor:
    dims = axes_of(axes, x.dim())
    mean = x.mean(dims, keepdim=True)
    deviation = (x.square().mean(dims, keepdim=True) - mean.square()).sqrt()
    return (x - mean) / (deviation + 1e-9)
