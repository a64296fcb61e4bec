"""Convolutions of a graph: their BatchNorm goes into their weights, and those with zeros get a kernel."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.utils.fusion import fuse_conv_bn_weights

from rarefy.engine import words
from rarefy.engine.trace import VIEWS, Node, Traced, aten, kind_of, new_constant, put, same, shape
from rarefy.runtime import winograd
from rarefy.runtime.packed_formats import (
    CONV_BLOCK,
    LEAST_ZEROS,
    LEAST_ZEROS_OF_SQUARES,
    MOST_BYTES_IN_A_SUM,
    MOST_STRIDE,
    NEAR,
    SHARED,
)
from rarefy.runtime.packing import pack_conv, pack_dense, shared

LEAST = 0.4  # zeros from which a kernel is faster than torch's dense one
NORMS = {
    aten._native_batch_norm_legit_no_training.default: 6,
    aten.batch_norm.default: 7,
}  # where the variance's least is


def convolution(t: Traced, node: Node) -> None:
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
        put(t, node, words.convolution, x, w, bias, None, None, *pairs, groups)


def batch_norm(t: Traced, node: Node) -> None:
    """A BatchNorm after a convolution that nothing else reads: weights and bias of their own."""
    outer = node
    if node.target is operator.getitem and node.args[1] == 0 and node.args[0].target in NORMS:
        node = node.args[0]
    elif node.target is not aten.batch_norm.default:
        return
    y, *norm = node.args[:5]
    if node.target is aten.batch_norm.default and node.args[5]:
        return  # by the batch's own numbers
    if y.target is not words.convolution or len(y.users) != 1 or y.args[3:5] != (None, None):
        return
    if (outer is not node and len(node.users) > 1) or not all(n is None or n.name in t.constants for n in norm):
        return
    x, w, bias, *rest = y.args
    W, b, gain, shift, mean, variance = (None if n is None else t.constants[n.name] for n in (w, bias, *norm))
    made = fuse_conv_bn_weights(W, b, mean, variance, node.args[NORMS[node.target]], gain, shift)  # type: ignore[arg-type]
    put(t, outer, words.convolution, x, *(new_constant(t, f"{y.name}_{n}", v) for n, v in zip("wb", made)), *rest)


def pooled(t: Traced, node: Node) -> None:
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
            put(t, node, words.pool, x, *pairs)
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
        put(t, node, words.average, over)


def few_zeros(weight: Tensor, least: tuple[float, float] = LEAST_ZEROS) -> bool:
    """Return whether a weight is multiplied by faster with its zeros: as many as there may be depends on whether the
    others come in fours."""
    W = weight.flatten(1)
    hit = torch.nn.functional.pad(W != 0, (0, 0, 0, -len(W) % 4)).view(-1, 4, W.shape[1])
    fours = float(hit.sum()) / max(1.0, float(hit.any(1).sum()))
    return 1 - float(hit.sum()) / W.numel() < least[fours < SHARED]


def packed(t: Traced, node: Node, values: str | None) -> Any:
    """Return the packed weight of a convolution, in `values` where it is of one group; None where torch runs it: with
    few zeros in groups of several, or depthwise."""
    w, (stride, padding, dilation, groups) = node.args[1], node.args[5:]
    weight = t.constants[w.name]
    zeros = float((weight == 0).float().mean())
    if max(stride) > MOST_STRIDE or (groups > 1 and (zeros < LEAST or weight.shape[1] == 1)):
        return None
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    wide = -(-weight.shape[1] // 4) * 4 * weight[0, 0].numel() > MOST_BYTES_IN_A_SUM
    kind = "fp32" if groups > 1 or wide else values or "fp32"
    by_squares = winograd.fit(tuple(weight.shape), tuple(stride), tuple(dilation), shape(node)[2:])
    least = LEAST_ZEROS_OF_SQUARES if by_squares else LEAST_ZEROS
    if groups == 1 and kind == "fp32" and few_zeros(weight, least):
        return pack_dense(weight, stride=tuple(stride), padding=tuple(padding), dilation=tuple(dilation))
    form = pack_conv(weight, kind, **how, block=CONV_BLOCK if groups > 1 else NEAR)
    if groups == 1 and shared(form) < SHARED:
        form = pack_conv(weight, kind, **how, block=NEAR, sell=True)
    return form
