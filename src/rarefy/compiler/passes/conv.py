"""Passes for images: convolutions with their BatchNorm, and pooling."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import (
    VIEWS,
    ExportedGraph,
    Node,
    add_constant,
    aten,
    dtype_of,
    keep_layer,
    replace_node,
    same,
    shape,
)
from rarefy.runtime.packed_formats import MAX_STRIDE

CONVOLUTIONS = {  # which torch may run
    aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.conv3d.default,
    aten.conv3d.padding,
}  # fmt: skip
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
GROUPS_ARGUMENT = 6  # of transposed convolutions
PADS = (aten.pad.default, aten.constant_pad_nd.default)
EPS_ARGUMENT = {aten._native_batch_norm_legit_no_training.default: 6, aten.batch_norm.default: 7}


def convert_conv(exported: ExportedGraph, node: Node) -> None:
    """Convert a 2D convolution with a constant weight."""
    if node.target is not aten.conv2d.default or dtype_of(node) != torch.float32 or len(shape(node)) != 4:
        return
    defaults: Any = (None, [1, 1], [0, 0], [1, 1], 1)
    x, w, *rest = node.args
    sizes: Any
    bias, *sizes, groups = (*rest, *defaults[len(rest) :])
    constant = w.name in exported.constants and (bias is None or bias.name in exported.constants)
    if constant and not any(isinstance(s, str) for s in sizes):
        stride, padding, dilation = (tuple(s) * 2 if len(s) == 1 else tuple(s) for s in sizes)
        x, w, padding = _absorb_padding(exported, x, w, padding, dilation)
        replace_node(exported, node, ops.conv2d, x, w, bias, None, None, stride, padding, dilation, groups)


def convert_transposed_conv(exported: ExportedGraph, node: Node) -> None:
    """Convert a transposed convolution whose kernel is its stride: a 1 x 1 convolution makes the pixels of each kernel
    as channels, which then become pixels."""
    if node.target is not aten.conv_transpose2d.input or dtype_of(node) != torch.float32 or len(shape(node)) != 4:
        return
    defaults: Any = (None, [1, 1], [0, 0], [0, 0], 1, [1, 1])
    x, w, *rest = node.args
    bias, stride, padding, added, groups, dilation = (*rest, *defaults[len(rest) :])
    weight = exported.constants.get(w.name)
    if weight is None or groups != 1 or (bias is not None and bias.name not in exported.constants):
        return
    kernel = list(weight.shape[2:])
    if [*stride, *stride][:2] != kernel or any([*padding, *added]) or any(d != 1 for d in dilation):
        return
    rows, columns = kernel
    flat = weight.permute(2, 3, 1, 0).reshape(-1, len(weight), 1, 1)  # [rows * columns * outputs, inputs, 1, 1]
    repeated = None if bias is None else exported.constants[bias.name].repeat(rows * columns)
    names = (
        None if t is None else add_constant(exported, f"{node.name}_{n}", t) for n, t in (("w", flat), ("b", repeated))
    )
    with exported.graph.inserting_before(node):
        call = (x, *names, None, None, (1, 1), (0, 0), (1, 1), 1)
        pixels = exported.graph.call_function(ops.conv2d, call)
    batch, _, height, width = shape(x)
    pixels.meta["val"] = node.meta["val"].new_empty((batch, len(flat), height, width))
    keep_layer(pixels, node)
    replace_node(exported, node, ops.depth_to_pixels, pixels, rows, columns)


def _absorb_padding(
    exported: ExportedGraph, x: Node, w: Node, padding: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[Node, Node, tuple[int, ...]]:
    """Return the image before zeros are added around it, and the weight and the padding that a convolution needs then.

    A convolution has equal padding on opposite sides. Where one more zero is added at the end, as TensorFlow's "same"
    does, the kernel gets a row or column of zeros at its beginning; where one more is added at the beginning, at its
    end. Larger differences stay with an operator of their own: products with zeros would cost more than it.
    """
    rounded = x.target is ops.fake_quantize and len(x.users) == 1  # zero is on each grid
    source = x.args[0] if rounded else x
    sides = _zeros_around(source)
    if sides is None:
        return x, w, padding
    left, right, top, bottom = sides
    differences = (bottom - top, right - left)
    if any(abs(n) not in (0, step) for n, step in zip(differences, dilation)):
        return x, w, padding
    image: Node = source.args[0]
    if rounded:
        x.update_arg(0, image)
        x.meta["val"] = image.meta["val"]
    else:
        x = image
    wider = padding[0] + max(top, bottom), padding[1] + max(left, right)
    if differences == (0, 0):
        return x, w, wider
    down, across = (n // step for n, step in zip(differences, dilation))
    grown = (max(across, 0), max(-across, 0), max(down, 0), max(-down, 0))
    return x, add_constant(exported, f"{w.name}_padded", F.pad(exported.constants[w.name], grown)), wider


def _zeros_around(x: Node) -> tuple[int, int, int, int] | None:
    """Return how many zeros a node adds around an image, left, right, top and bottom, or None if it does not."""
    if x.target not in PADS or dtype_of(x) != torch.float32:
        return None
    _, sides, *mode = (*x.args, *x.kwargs.values())
    with_zeros = [v for v in mode if v is not None] in ([], [0], ["constant"], ["constant", 0])
    if not with_zeros or len(sides) not in (2, 4) or not all(isinstance(n, int) and n >= 0 for n in sides):
        return None
    left, right, top, bottom = (int(n) for n in (*sides, 0, 0)[:4])  # type: ignore[call-overload]
    return left, right, top, bottom


def fold_batch_norm(exported: ExportedGraph, node: Node) -> None:
    """Fold a BatchNorm into the weight and bias of the convolution before it, if nothing else reads that.

    Convolutions of the engine, and those that stay in torch.
    """
    outer = node
    if node.target is operator.getitem and node.args[1] == 0 and node.args[0].target in EPS_ARGUMENT:
        node = node.args[0]
    elif node.target is not aten.batch_norm.default:
        return
    y, *norm = node.args[:5]
    if node.target is aten.batch_norm.default and node.args[5]:
        return  # it normalizes by the statistics of the batch
    if not _takes_batch_norm(y) or len(y.users) != 1 or (outer is not node and len(node.users) > 1):
        return
    x, w, bias, *rest = (*y.args, None)[: max(len(y.args), 3)]
    if any(n is not None and n.name not in exported.constants for n in (w, bias, *norm)):
        return
    W, b, gamma, beta, mean, var = (None if n is None else exported.constants[n.name] for n in (w, bias, *norm))
    eps = node.args[EPS_ARGUMENT[node.target]]
    folded = fuse_conv_bn_weights(W, b, mean, var, eps, gamma, beta, transpose=y.target in TRANSPOSED)  # type: ignore[arg-type]
    new = (add_constant(exported, f"{y.name}_{n}", v) for n, v in zip("wb", folded))
    keep_layer(replace_node(exported, outer, y.target, x, *new, *rest), y)


def _takes_batch_norm(y: Node) -> bool:
    """Return whether a node is a convolution whose weight can take a scale for each output channel."""
    if y.target is ops.conv2d:
        return y.args[3:5] == (None, None)  # neither an activation nor a residual sum between
    if y.kwargs or dtype_of(y) != torch.float32:
        return False
    if y.target in TRANSPOSED:
        return len(y.args) <= GROUPS_ARGUMENT or y.args[GROUPS_ARGUMENT] == 1
    return y.target in CONVOLUTIONS


def convert_pool(exported: ExportedGraph, node: Node) -> None:
    """Convert max pooling, and the mean over all pixels."""
    if dtype_of(node) != torch.float32:
        return
    if node.target is aten.max_pool2d.default:
        x, kernel, *rest = node.args
        stride: Any
        stride, padding, dilation, ceil = (*rest, *([], [0, 0], [1, 1], False)[len(rest) :])
        sizes: Any = (kernel, stride or kernel, padding, dilation)
        pairs = [tuple(v) * 2 if len(v) == 1 else tuple(v) for v in sizes]
        if len(shape(x)) == 4 and max(pairs[1]) <= MAX_STRIDE:
            replace_node(exported, node, ops.max_pool2d_ceil if ceil else ops.max_pool2d, x, *pairs)
        return
    image = _averaged_image(node)
    if isinstance(image, fx.Node) and len(shape(image)) == 4:
        replace_node(exported, node, ops.global_avg_pool, image)


def convert_avg_pool(exported: ExportedGraph, node: Node) -> None:
    """Convert average pooling: to a depthwise convolution where all windows have one divisor."""
    if node.target is not aten.avg_pool2d.default or dtype_of(node) != torch.float32 or len(shape(node)) != 4:
        return
    x, kernel, *rest = node.args
    stride: Any
    stride, padding, ceil, counts_padding, divisor = (*rest, *([], [0, 0], False, True, None)[len(rest) :])
    sizes: Any = (kernel, stride or kernel, padding)
    kernel, stride, padding = (tuple(v) * 2 if len(v) == 1 else tuple(v) for v in sizes)
    channels = shape(x)[1]
    if ceil or divisor or max(stride) > MAX_STRIDE or node.kwargs:
        return
    if max(padding) and not counts_padding:
        replace_node(exported, node, ops.avg_pool2d, x, kernel, stride, padding)
    elif channels > 1 and str(channels).isdigit():
        mean = torch.full((int(channels), 1, *kernel), 1 / (kernel[0] * kernel[1]), dtype=torch.float32)
        weight = add_constant(exported, f"{node.name}_mean", mean)
        replace_node(exported, node, ops.conv2d, x, weight, None, None, None, stride, padding, (1, 1), int(channels))


def _averaged_image(node: Node) -> Any:
    """Return the value over whose last two dimensions a node [batch, channels] is the mean, or None."""
    if node.target in VIEWS and len(shape(node)) == 2:
        y = node.args[0]
        pooled = isinstance(y, fx.Node) and len(y.users) == 1 and same(shape(node), shape(y)[:2])
        if pooled and y.target in (aten.adaptive_avg_pool2d.default, aten.mean.dim) and shape(y)[2:] == (1, 1):
            return y.args[0]
    elif node.target is aten.mean.dim and len(shape(node)) == 2 and sorted(d % 4 for d in node.args[1]) == [2, 3]:
        return node.args[0]
    return None
