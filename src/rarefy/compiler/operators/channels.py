"""Operators on the channels of images: affine maps, gates, means, norms, concatenation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.compiler import nhwc, nhwc_channels
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.operators.pooling import is_image, lower_global_avg_pool
from rarefy.compiler.operators.spec import PIXELS, Call, OpSpec, Shape
from rarefy.compiler.program import Part, Program
from rarefy.runtime import bindings
from rarefy.runtime.reference import ACTIVATIONS

MAX_CONCATENATED = 8  # images of one operator


def channel_affine(x: Tensor, scale: Tensor, bias: Tensor, act: str | None) -> Tensor:
    """Return act(x scale + bias); scale and bias are [channels], x is [batch, channels, height, width]."""
    return ACTIVATIONS[act](torch.addcmul(bias[:, None, None], x, scale[:, None, None]))


def channel_scale(x: Tensor, factor: Tensor) -> Tensor:
    """Return x [batch, channels, height, width] times factor [batch, channels, 1, 1]."""
    return x * factor


def image_mean(x: Tensor) -> Tensor:
    """Return means over pixels, [batch, channels, 1, 1]; x is [batch, channels, height, width]."""
    return x.mean((2, 3), keepdim=True)


def channel_norm(x: Tensor, gamma: Tensor | None, bias: Tensor | None, eps: float, centered: bool) -> Tensor:
    """Return LayerNorm over the channels of each pixel of x [batch, channels, height, width], or RMSNorm if it is not
    centered; gamma and bias are [channels]."""
    y = x.permute(0, 2, 3, 1)
    y = F.layer_norm(y, y.shape[-1:], gamma, bias, eps) if centered else F.rms_norm(y, y.shape[-1:], gamma, eps)
    return (y if centered or bias is None else y + bias).permute(0, 3, 1, 2)


def group_norm(x: Tensor, gamma: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """Return GroupNorm of x [batch, channels, height, width] (Wu and He 2018); gamma and bias are [channels]."""
    return F.group_norm(x, groups, gamma, bias, eps)


def concat(
    a: Tensor, b: Tensor, c: Tensor | None, d: Tensor | None, e: Tensor | None, f: Tensor | None, g: Tensor | None,
    h: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return the channels of two to eight images [batch, channels, height, width], one after the other."""
    return torch.cat([t for t in (a, b, c, d, e, f, g, h) if t is not None], 1)


def select_channels(x: Tensor, order: Tensor) -> Tensor:
    """Return channels of x [batch, channels, height, width] in the order of an int64 index."""
    return x[:, order]


def depth_to_pixels(x: Tensor, rows: int, columns: int) -> Tensor:
    """Return an image of rows * columns pixels for each pixel of x [batch, rows * columns * channels, height, width],
    whose channels are those of one pixel after the other."""
    batch, _, height, width = x.shape
    pixels = x.unflatten(1, (rows, columns, -1)).permute(0, 3, 4, 1, 5, 2)
    return pixels.reshape(batch, -1, height * rows, width * columns)


def _lower_channel_affine(p: Program, node: Node) -> None:
    x, scale, bias, act = node.args
    if nhwc_channels.lower_map(p, node, x, act, scale=scale, bias=bias):
        return
    source, out = p.use(p.values[x]), p.make(node)
    constants = {"gamma": p.constant(scale), "bias": p.constant(bias)}
    p.step("channel_affine", out, x=source, out=p.use(out), act=bindings.ACTIVATIONS.index(act), **constants)


def _lower_channel_scale(p: Program, node: Node) -> None:
    if nhwc_channels.lower_map(p, node, node.args[0], gate=node.args[1]):
        return
    x, factor = (p.use(p.values[n]) for n in node.args)
    out = p.make(node)
    p.step("channel_scale", out, x=x, other=factor, out=p.use(out))


def _lower_channel_norm(p: Program, node: Node) -> None:
    x, gamma, bias, eps, centered = node.args
    source, out = p.use(p.values[x]), p.make(node)
    weights = {"gamma": p.constant(gamma), "bias": p.constant(bias)}
    p.step("norm", out, x=source, out=p.use(out), **weights, eps=eps, subtract_mean=int(centered))


def _lower_group_norm(p: Program, node: Node) -> None:
    x, gamma, bias, groups, eps = node.args
    source, out = p.use(p.values[x]), p.make(node)
    weights = {"gamma": p.constant(gamma), "bias": p.constant(bias)}
    p.step("group_norm", out, x=source, out=p.use(out), **weights, eps=eps, groups=groups)


def _lower_concat(p: Program, node: Node) -> None:
    if nhwc_channels.lower_concat(p, node):
        return
    images = [n for n in node.args if n is not None]
    out, first = p.make(node), 0
    for n in images:
        source = p.use(p.values[n])
        part = Part(out, first, source.features)
        p.step("add", part, x=source, out=p.use(part), act=bindings.ACTIVATIONS.index(None))
        first += source.features


def _lower_select_channels(p: Program, node: Node) -> None:
    x, order = node.args
    taken = p.constants[order.name]
    if nhwc.output_format(p, node) is None and torch.equal(taken, taken[0] + torch.arange(len(taken))):
        p.values[node] = Part(p.values[x], int(taken[0]), len(taken))  # where it is, in column tiles
    else:
        nhwc_channels.lower_select(p, node)


def _spread_fits(call: Call) -> bool:
    _, rows, columns = call.node.args
    return is_image(call) and call.shapes[0][1] > 0 and not call.shapes[0][1] % (rows * columns)


def _spread_shape(call: Call) -> Shape:
    (batch, channels, height, width), (_, rows, columns) = call.shapes[0], call.node.args
    return batch, channels // (rows * columns), height * rows, width * columns


def _constants_fit(call: Call) -> bool:
    """Return whether all constants are fp32 vectors, one number for each channel."""
    constants = [call.constants[n.name] for n in call.node.args[1:3] if n is not None]
    return is_image(call) and all(tuple(c.shape) == call.shapes[0][1:2] for c in constants)


def _group_norm_fits(call: Call) -> bool:
    return _constants_fit(call) and not call.shapes[0][1] % call.node.args[3]


def _scale_fits(call: Call) -> bool:
    x, factor = call.shapes
    return is_image(call) and factor == (*x[:2], 1, 1)


def _concat_fits(call: Call) -> bool:
    x, *rest = call.shapes
    return is_image(call) and all(len(s) == 4 and s[1] > 0 and (s[0], *s[2:]) == (x[0], *x[2:]) for s in rest)


def _concat_shape(call: Call) -> Shape:
    x = call.shapes[0]
    return (x[0], sum(s[1] for s in call.shapes), *x[2:])


def _selection_fits(call: Call) -> bool:
    order = call.constants[call.node.args[1].name]
    return is_image(call) and int(order.min()) >= 0 and int(order.max()) < call.shapes[0][1]


def _selected_shape(call: Call) -> Shape:
    batch, _, *size = call.shapes[0]
    return (batch, len(call.constants[call.node.args[1].name]), *size)


def _check_order(call: Call) -> None:
    order = call.constants[call.node.args[1].name]
    if order.dtype != torch.int64 or order.dim() != 1 or not len(order):
        dtype = str(order.dtype).removeprefix("torch.")
        raise ValueError(f"expected an order of int64 [channels], got {dtype} {list(order.shape)}")


def _check_vectors(call: Call) -> None:
    shapes = [tuple(call.constants[n.name].shape) for n in call.node.args[1:3] if n is not None]
    if any(len(s) != 1 or s != shapes[0] for s in shapes):
        raise ValueError(f"expected vectors of one length, got shapes {shapes}")


OPERATORS = (
    OpSpec(
        reference=channel_affine,
        arguments=("tensor", "constant", "constant", "act"),
        lower=_lower_channel_affine,
        fits=_constants_fit,
        layout=PIXELS,
        check_weights=_check_vectors,
    ),
    OpSpec(
        reference=channel_scale,
        arguments=("tensor", "tensor"),
        lower=_lower_channel_scale,
        fits=_scale_fits,
        layout=PIXELS,
    ),
    OpSpec(
        reference=image_mean,
        arguments=("tensor",),
        lower=lower_global_avg_pool,
        fits=is_image,
        out_shape=lambda call: (*call.shapes[0][:2], 1, 1),
        layout=PIXELS,
    ),
    OpSpec(
        reference=channel_norm,
        arguments=("tensor", "constant?", "constant?", "number", "flag"),
        lower=_lower_channel_norm,
        fits=_constants_fit,
        layout=PIXELS,
        check_weights=_check_vectors,
    ),
    OpSpec(
        reference=group_norm,
        arguments=("tensor", "constant?", "constant?", "count", "number"),
        lower=_lower_group_norm,
        fits=_group_norm_fits,
        layout=PIXELS,
        check_weights=_check_vectors,
    ),
    OpSpec(
        reference=concat,
        arguments=("tensor", "tensor", *["tensor?"] * (MAX_CONCATENATED - 2)),
        lower=_lower_concat,
        fits=_concat_fits,
        out_shape=_concat_shape,
        layout=PIXELS,
    ),
    OpSpec(
        reference=select_channels,
        arguments=("tensor", "constant"),
        lower=_lower_select_channels,
        fits=_selection_fits,
        out_shape=_selected_shape,
        layout=PIXELS,
        check_weights=_check_order,
    ),
    OpSpec(
        reference=depth_to_pixels,
        arguments=("tensor", "count", "count"),
        lower=nhwc_channels.lower_spread,
        fits=_spread_fits,
        out_shape=_spread_shape,
        layout=PIXELS,
    ),
)
