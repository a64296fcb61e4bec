"""Convolutions of a graph: their BatchNorm goes into their weights, and those with zeros get a kernel."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import VIEWS, ExportedGraph, Node, add_constant, aten, kind_of, replace_node, same, shape
from rarefy.runtime.packed_formats import (
    MOST_STRIDE,
)

NORMS = {
    aten._native_batch_norm_legit_no_training.default: 6,
    aten.batch_norm.default: 7,
}  # where the variance's least is


def convert_conv(t: ExportedGraph, node: Node) -> None:
    """A convolution of images by a constant weight."""
    if node.target is not aten.conv2d.default or kind_of(node) != torch.float32:
        return
    usual: Any = (None, [1, 1], [0, 0], [1, 1], 1)
    x, w, *rest = node.args
    sizes: Any
    bias, *sizes, groups = (*rest, *usual[len(rest) :])
    known = w.name in t.constants and (bias is None or bias.name in t.constants)
    if known and not any(isinstance(s, str) for s in sizes):
        pairs = (tuple(s) * 2 if len(s) == 1 else tuple(s) for s in sizes)
        replace_node(t, node, ops.conv2d, x, w, bias, None, None, *pairs, groups)


def fold_batch_norm(t: ExportedGraph, node: Node) -> None:
    """A BatchNorm after a convolution that nothing else reads: weights and bias of their own."""
    outer = node
    if node.target is operator.getitem and node.args[1] == 0 and node.args[0].target in NORMS:
        node = node.args[0]
    elif node.target is not aten.batch_norm.default:
        return
    y, *norm = node.args[:5]
    if node.target is aten.batch_norm.default and node.args[5]:
        return  # by the batch's own numbers
    if y.target is not ops.conv2d or len(y.users) != 1 or y.args[3:5] != (None, None):
        return
    if (outer is not node and len(node.users) > 1) or not all(n is None or n.name in t.constants for n in norm):
        return
    x, w, bias, *rest = y.args
    W, b, gain, shift, mean, variance = (None if n is None else t.constants[n.name] for n in (w, bias, *norm))
    made = fuse_conv_bn_weights(W, b, mean, variance, node.args[NORMS[node.target]], gain, shift)  # type: ignore[arg-type]
    replace_node(t, outer, ops.conv2d, x, *(add_constant(t, f"{y.name}_{n}", v) for n, v in zip("wb", made)), *rest)


def convert_pool(t: ExportedGraph, node: Node) -> None:
    """The largest, or the mean of all, of pixels."""
    if kind_of(node) != torch.float32:
        return
    if node.target is aten.max_pool2d.default:
        x, kernel, *rest = node.args
        stride: Any
        stride, padding, dilation, ceil = (*rest, *([], [0, 0], [1, 1], False)[len(rest) :])
        sizes: Any = (kernel, stride or kernel, padding, dilation)
        pairs = [tuple(v) * 2 if len(v) == 1 else tuple(v) for v in sizes]
        if not ceil and len(shape(x)) == 4 and max(pairs[1]) <= MOST_STRIDE:
            replace_node(t, node, ops.max_pool2d, x, *pairs)
        return
    y, over = node, None
    if node.target in VIEWS and len(shape(node)) == 2:
        y = node.args[0]
        alone = isinstance(y, fx.Node) and len(y.users) == 1 and same(shape(node), shape(y)[:2])
        over = y.args[0] if alone and y.target is aten.adaptive_avg_pool2d.default and shape(y)[2:] == (1, 1) else None
        if alone and y.target is aten.mean.dim and shape(y)[2:] == (1, 1):
            over = y.args[0]
    elif node.target is aten.mean.dim and len(shape(node)) == 2 and sorted(d % 4 for d in node.args[1]) == [2, 3]:
        over = node.args[0]
    if isinstance(over, fx.Node) and len(shape(over)) == 4:
        replace_node(t, node, ops.global_avg_pool, over)
