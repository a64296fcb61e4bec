"""Pooling of images."""

from __future__ import annotations

from ctypes import addressof
from math import inf, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.compiler import nhwc, nhwc_channels
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.input_steps import conv_geometry, out_sizes, pad_planes
from rarefy.compiler.operators.spec import IMAGES, IMAGES_TO_ROWS, Call, OpSpec, Shape
from rarefy.compiler.program import Program
from rarefy.runtime.packed_formats import MAX_STRIDE

Pair = tuple[int, int]


def max_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return the largest pixel of each window; x is [batch, channels, height, width]."""
    return F.max_pool2d(x, kernel, stride, padding, dilation)


def max_pool2d_ceil(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Return the largest pixel of each window, of windows that begin in the image and end beyond it too."""
    return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode=True)


def avg_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Return the mean of each window without its padding; x is [batch, channels, height, width]."""
    return F.avg_pool2d(x, kernel, stride, padding, count_include_pad=False)


def global_avg_pool(x: Tensor) -> Tensor:
    """Return means over pixels, [batch, channels]; x is [batch, channels, height, width]."""
    return x.mean((2, 3))


def _lower_max_pool2d(p: Program, node: Node) -> None:
    if nhwc.lower_max_pool(p, node):
        return
    x, kernel, stride, padding, dilation = node.args
    planes, image = pad_planes(p, x, conv_geometry(kernel, stride, padding, dilation), -inf)
    out = p.make(node)
    p.step("max_pool", out, x=p.use(planes), out=p.use(out), indirection=addressof(image), batch=p.shape(x)[0])


def _lower_max_pool2d_ceil(p: Program, node: Node) -> None:
    if not nhwc.lower_max_pool(p, node):
        nhwc_channels.lower_pool_into_tiles(p, node)


def _lower_avg_pool2d(p: Program, node: Node) -> None:
    x, kernel, stride, padding = node.args
    planes, image = pad_planes(p, x, conv_geometry(kernel, stride, padding, (1, 1)), 0.0)
    out = p.make(node)
    weights = torch.ones(out.features, prod(kernel), dtype=torch.float32)
    inside = F.conv2d(
        torch.ones(1, 1, *p.shape(x)[2:], dtype=torch.float32),
        torch.ones(1, 1, *kernel, dtype=torch.float32),
        None,
        stride,
        padding,
    )
    factors = (1 / inside).flatten()
    p.held += [weights, factors]
    fields = {"depthwise_weights": weights.data_ptr(), "gamma": factors.data_ptr(), "batch": p.shape(x)[0]}
    p.step("depthwise_conv", out, x=p.use(planes), out=p.use(out), indirection=addressof(image), **fields)


def lower_global_avg_pool(p: Program, node: Node) -> None:
    """Add the step of means over the pixels of each image."""
    if nhwc_channels.lower_mean(p, node):
        return
    _, _, height, width = p.shape(node.args[0])
    source = p.values[node.args[0]]
    out = p.make(node)
    p.step("global_avg_pool", out, x=p.use(source), out=p.use(out), tokens=height * width)


def _pooled_shape(call: Call) -> Shape:
    x, (kernel, stride, padding, *dilation) = call.shapes[0], call.node.args[1:]
    return (*x[:2], *out_sizes(x[2:], kernel, stride, padding, *(dilation or [(1, 1)])))


def _pool2d_fits(call: Call) -> bool:
    kernel, stride, padding = call.node.args[1:4]
    (x,) = call.shapes
    if len(x) != 4 or 0 in x or max(stride) > MAX_STRIDE or any(2 * p > k for p, k in zip(padding, kernel)):
        return False
    return min(_pooled_shape(call)[2:]) > 0


def _ceil_pool2d_fits(call: Call) -> bool:
    return _pool2d_fits(call) and min(_ceil_pooled_shape(call)[2:]) > 0


def _ceil_pooled_shape(call: Call) -> Shape:
    x, (kernel, stride, padding, dilation) = call.shapes[0], call.node.args[1:]
    wider = tuple(n + s - 1 for n, s in zip(x[2:], stride))
    sizes = zip(x[2:], out_sizes(wider, kernel, stride, padding, dilation), stride, padding)
    return (*x[:2], *(n - ((n - 1) * s >= size + p) for size, n, s, p in sizes))  # the last one begins in the image


def is_image(call: Call) -> bool:
    """Return whether the first argument is an image [batch, channels, height, width] with pixels."""
    return len(call.shapes[0]) == 4 and 0 not in call.shapes[0]


OPERATORS = (
    OpSpec(
        reference=max_pool2d,
        arguments=("tensor", "steps", "steps", "padding", "steps"),
        lower=_lower_max_pool2d,
        fits=_pool2d_fits,
        out_shape=_pooled_shape,
        layout=IMAGES,
    ),
    OpSpec(
        reference=max_pool2d_ceil,
        arguments=("tensor", "steps", "steps", "padding", "steps"),
        lower=_lower_max_pool2d_ceil,
        fits=_ceil_pool2d_fits,
        out_shape=_ceil_pooled_shape,
        layout=IMAGES,
    ),
    OpSpec(
        reference=avg_pool2d,
        arguments=("tensor", "steps", "steps", "padding"),
        lower=_lower_avg_pool2d,
        fits=_pool2d_fits,
        out_shape=_pooled_shape,
        layout=IMAGES,
    ),
    OpSpec(
        reference=global_avg_pool,
        arguments=("tensor",),
        lower=lower_global_avg_pool,
        fits=is_image,
        out_shape=lambda call: call.shapes[0][:2],
        layout=IMAGES_TO_ROWS,
    ),
)
