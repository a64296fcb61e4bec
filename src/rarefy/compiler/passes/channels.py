"""Passes for operators on the channels of images: scales, BatchNorms that stand alone, gates, norms, concatenation."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import (
    ExportedGraph,
    Node,
    add_constant,
    aten,
    is_node,
    keep_layer,
    replace_node,
    replace_uses,
    same,
    shape,
)
from rarefy.compiler.operators.channels import MAX_CONCATENATED
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.compiler.passes.activation import LIMITS
from rarefy.compiler.passes.conv import EPS_ARGUMENT
from rarefy.compiler.passes.linear import scaled_weights
from rarefy.compiler.passes.matchers import is_image, is_of_images, only_user

ROW_OPERATORS = (ops.linear, ops.norm, ops.activation, ops.add, ops.mul)
MAX_ROW_OPERATORS = 64
TO_ROWS, TO_IMAGES = [0, 2, 3, 1], [0, 3, 1, 2]  # permutations of [batch, channels, height, width], and back


def _vector(exported: ExportedGraph, x: Any, channels: Any) -> Tensor | None:
    """Return a number, or a constant with a number for each channel of images, as a vector; None for anything else."""
    if not isinstance(x, fx.Node):
        fixed = isinstance(x, float | int) and str(channels).isdigit()
        return torch.full((int(channels),), float(x), dtype=torch.float32) if fixed else None
    value = exported.constants.get(x.name)
    if value is None or value.dim() not in (3, 4) or value.numel() != value.shape[-3] or value.numel() != channels:
        return None
    return value.flatten()


def fold_channel_scale(exported: ExportedGraph, node: Node) -> None:
    """Fold a constant for each channel that multiplies a convolution's outputs into its weight and bias, and one that
    multiplies a linear layer's whose rows become an image."""
    if node.target is not aten.mul.Tensor or not is_image(node) or node.kwargs:
        return
    for y, scale in (node.args, node.args[::-1]):
        if is_node(y) and y.target is aten.permute.default and list(y.args[1]) == TO_IMAGES and len(y.users) == 1:
            rows, s = y.args[0], _vector(exported, scale, shape(y)[1])
            if s is not None and rows.target is ops.linear and len(rows.users) == 1 and rows.args[3:] == (None, None):
                weights = scaled_weights(exported, node, rows.args[1:3], s)
                replace_node(exported, rows, ops.linear, rows.args[0], *weights, None, None)
                replace_uses(exported, node, y)
                return
        if is_node(y) and y.target is ops.conv2d and len(y.users) == 1 and y.args[3:5] == (None, None):
            s = _vector(exported, scale, shape(y)[1])
            if s is not None:
                weights = scaled_weights(exported, node, y.args[1:3], s)
                replace_node(exported, node, ops.conv2d, y.args[0], *weights, *y.args[3:])
                return


def convert_batch_norm(exported: ExportedGraph, node: Node) -> None:
    """Convert a BatchNorm of images that follows no convolution to a scale and a bias for each channel."""
    outer = node
    if node.target is operator.getitem and node.args[1] == 0 and node.args[0].target in EPS_ARGUMENT:
        node = node.args[0]
    elif node.target is not aten.batch_norm.default:
        return
    x, *norm = node.args[:5]
    batch_statistics = node.target is aten.batch_norm.default and node.args[5]
    if not is_image(outer) or batch_statistics or (outer is not node and len(node.users) > 1):
        return
    if any(n is not None and n.name not in exported.constants for n in norm) or None in norm[2:]:
        return
    gamma, beta, mean, var = (None if n is None else exported.constants[n.name] for n in norm)
    scale = torch.rsqrt(var + node.args[EPS_ARGUMENT[node.target]])  # type: ignore[operator]
    scale = scale if gamma is None else scale * gamma
    bias = -mean * scale if beta is None else beta - mean * scale  # type: ignore[operator]
    values = (add_constant(exported, f"{outer.name}_{n}", v) for n, v in (("scale", scale), ("shift", bias)))
    replace_node(exported, outer, ops.channel_affine, x, *values, None)


def convert_constants(exported: ExportedGraph, node: Node) -> None:
    """Convert sums and products of an image and a constant for each channel, and differences of two images."""
    if node.target is aten.div.Tensor and is_image(node) and not node.kwargs and not is_node(node.args[1]):
        node.target, node.args = aten.mul.Tensor, (node.args[0], 1 / node.args[1])
    if node.target not in (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor) or not is_image(node) or node.kwargs:
        return
    x, y = node.args
    if node.target is aten.mul.Tensor or node.target is aten.add.Tensor:
        x, y = (y, x) if is_node(x) and x.name in exported.constants else (x, y)
    computed = is_image(x) and x.target in BY_TARGET and same(shape(x), shape(node))
    vector = _vector(exported, y, shape(node)[1])
    if not computed or not (vector is not None or _is_difference(exported, node, y)):
        return
    if not is_node(y) and not is_of_images(x):
        return
    if vector is None:
        channels = int(shape(node)[1])
        zeros = torch.zeros(channels, dtype=torch.float32)
        negative = _affine(exported, node, y, zeros - 1, zeros)
        replace_node(exported, node, ops.add, x, negative, None)
    elif node.target is aten.mul.Tensor:
        replace_uses(exported, node, _affine(exported, node, x, vector, torch.zeros_like(vector)))
    else:
        shift = vector if node.target is aten.add.Tensor else -vector
        replace_uses(exported, node, _affine(exported, node, x, torch.ones_like(vector), shift))


def fold_affine(exported: ExportedGraph, node: Node) -> None:
    """Fold a scale and a shift of each channel into the convolution, or the scale and shift, that only they read."""
    if node.target is not ops.channel_affine:
        return
    y, scale, shift, act = node.args
    if not is_node(y) or len(y.users) != 1:
        return
    s, b = (exported.constants[n.name] for n in (scale, shift))
    if y.target is ops.conv2d and y.args[3:5] == (None, None):
        weight, bias = scaled_weights(exported, node, y.args[1:3], s)
        total = b if bias is None else b + exported.constants[bias.name]
        new = add_constant(exported, f"{node.name}_bias", total)
        keep_layer(replace_node(exported, node, ops.conv2d, y.args[0], weight, new, None, act, *y.args[5:]), y)
    elif y.target is ops.channel_affine and y.args[3] is None:
        before, moved = (exported.constants[n.name] for n in y.args[1:3])
        values = (
            add_constant(exported, f"{node.name}_{n}", v) for n, v in (("scale", before * s), ("shift", moved * s + b))
        )
        replace_node(exported, node, ops.channel_affine, y.args[0], *values, act)


def convert_unit_clamp(exported: ExportedGraph, node: Node) -> None:
    """Convert clamp(x, 0, 1) of an image to a hard sigmoid of 6 x - 3, whose factors the operator before can take."""
    if node.target not in LIMITS or node.kwargs or tuple(node.args[1:]) != (0, 1) or not is_image(node):
        return
    x, channels = node.args[0], shape(node)[1]
    if is_node(x) and is_of_images(x) and str(channels).isdigit():
        zeros = torch.zeros(int(channels), dtype=torch.float32)  # type: ignore[call-overload]
        moved = _affine(exported, node, x, zeros + 6, zeros - 3)
        replace_node(exported, node, ops.activation, moved, "hardsigmoid")


def _is_difference(exported: ExportedGraph, node: Node, y: Any) -> bool:
    """Return whether a node subtracts a computed image of its own shape, y."""
    computed = is_image(y) and y.name not in exported.constants and same(shape(y), shape(node))
    return node.target is aten.sub.Tensor and computed and str(shape(node)[1]).isdigit()


def _affine(exported: ExportedGraph, before: Node, x: Node, scale: Tensor, shift: Tensor) -> Node:
    """Return x scale + shift, with numbers for each channel of x, in front of a node."""
    values = (add_constant(exported, f"{before.name}_{n}", v) for n, v in (("scale", scale), ("shift", shift)))
    with exported.graph.inserting_before(before):
        new = exported.graph.call_function(ops.channel_affine, (x, *values, None))
    new.meta["val"] = x.meta["val"]
    return keep_layer(new, before)


def convert_mean(exported: ExportedGraph, node: Node) -> None:
    """Convert means over all pixels that keep their dimensions."""
    if not is_image(node) or shape(node)[2:] != (1, 1) or not node.args or not is_image(node.args[0]):
        return
    x = node.args[0]
    dims = node.args[1] if node.target is aten.mean.dim and not node.kwargs else None
    over_pixels = dims is not None and sorted(d % 4 for d in dims) == [2, 3]
    if over_pixels or (node.target is aten.adaptive_avg_pool2d.default and list(node.args[1]) in ([1], [1, 1])):
        replace_node(exported, node, ops.image_mean, x)


def convert_scale(exported: ExportedGraph, node: Node) -> None:
    """Convert a product of an image and a number for each of its channels, as squeeze-and-excitation has it."""
    if node.target is not aten.mul.Tensor or not is_image(node) or node.kwargs:
        return
    for x, factor in (node.args, node.args[::-1]):
        computed = is_image(x) and is_image(factor) and not {x.name, factor.name} & set(exported.constants)
        if computed and shape(factor)[2:] == (1, 1) and same(shape(x), shape(node)):
            if same(shape(x)[:2], shape(factor)[:2]):
                replace_node(exported, node, ops.channel_scale, x, factor)
            return


def convert_norm(exported: ExportedGraph, node: Node) -> None:
    """Fuse a norm between two permutations into a norm over the channels of images."""
    if node.target is not aten.permute.default or list(node.args[1]) != TO_IMAGES or not is_image(node):
        return
    norm = node.args[0]
    if norm.target is not ops.norm or only_user(norm) is not node or norm.args[5] != 1:
        return
    x = norm.args[0]
    if isinstance(x, fx.Node) and x.target is aten.permute.default and list(x.args[1]) == TO_ROWS:  # type: ignore[arg-type]
        replace_node(exported, node, ops.channel_norm, x.args[0], *norm.args[1:5])


def convert_group_norm(exported: ExportedGraph, node: Node) -> None:
    """Convert GroupNorm and InstanceNorm of images with a constant scale and bias for each channel, or none."""
    if node.target not in (aten.group_norm.default, aten.instance_norm.default) or not is_image(node) or node.kwargs:
        return
    if node.target is aten.group_norm.default:
        x, groups, *rest = node.args
        gamma, bias, eps = (*rest[:3], *(None, None, 1e-5)[len(rest) :])
    else:
        x, gamma, bias, *statistics, of_input, _, eps, _ = node.args
        groups = shape(x)[1]
        if statistics != [None, None] or not of_input:
            return
    constant = all(n is None or str(n) in exported.constants for n in (gamma, bias))
    if constant and str(shape(x)[1]).isdigit() and x.name not in exported.constants:
        replace_node(exported, node, ops.group_norm, x, gamma, bias, int(groups), eps)


def convert_concat(exported: ExportedGraph, node: Node) -> None:
    """Convert a concatenation of the channels of images."""
    if node.target is not aten.cat.default or not is_image(node) or (*node.args, 0)[1] not in (1, -3):
        return
    images: list[Any] = [*node.args[0]]
    if len(images) == 1:
        replace_uses(exported, node, images[0])
        return
    if not all(is_image(x) and x.name not in exported.constants for x in images):
        return
    while len(images) > MAX_CONCATENATED:
        with exported.graph.inserting_before(node):
            first = exported.graph.call_function(ops.concat, tuple(images[:MAX_CONCATENATED]))
        first.meta["val"] = torch.cat([x.meta["val"] for x in images[:MAX_CONCATENATED]], 1)
        images = [first, *images[MAX_CONCATENATED:]]
    replace_node(exported, node, ops.concat, *images, *[None] * (MAX_CONCATENATED - len(images)))


def rows_to_images(exported: ExportedGraph, node: Node) -> None:
    """Let operators on rows between two permutations run on the image itself: linear layers as 1x1 convolutions."""
    if node.target is not aten.permute.default or list(node.args[1]) != TO_IMAGES or not is_image(node):
        return
    inside: dict[Node, None] = {}
    if not _collect_rows(node.args[0], inside) or any(
        u is not node and u not in inside for n in inside for u in n.users
    ):
        return
    images: dict[Node, Node] = {}
    for old in [n for n in exported.graph.nodes if n in inside]:  # in the graph's order
        images[old] = keep_layer(_image_operator(exported, node, old, images), old)
    replace_uses(exported, node, images[node.args[0]])


def _collect_rows(node: Any, inside: dict[Node, None]) -> bool:
    """Collect the operators between a value and permutations of images to rows; return whether all are known."""
    if (
        not is_node(node)
        or len(shape(node)) != 4
        or node.target not in ROW_OPERATORS
        or len(inside) >= MAX_ROW_OPERATORS
    ):
        return False
    if node.target is ops.norm and node.args[5] != 1:
        return False
    inside[node] = None
    return all(_permuted_image(x) is not None or x in inside or _collect_rows(x, inside) for x in _row_inputs(node))


def _permuted_image(x: Any) -> Any:
    """Return the image that a node permutes to rows, None for anything else."""
    if is_node(x) and x.target is aten.permute.default and list(x.args[1]) == TO_ROWS and is_image(x.args[0]):
        return x.args[0]
    return None


def _row_inputs(node: Node) -> list[Node]:
    return BY_TARGET[node.target].tensors(node)


def _image_operator(exported: ExportedGraph, before: Node, old: Node, images: dict[Node, Node]) -> Node:
    """Return the operator on images that does what one on rows does."""

    def image(x: Any) -> Any:
        return images[x] if x in images else _permuted_image(x)

    if old.target is ops.linear:
        x, w, bias, residual, act = old.args
        weight = add_constant(exported, f"{w.name}_pointwise", exported.constants[w.name][:, :, None, None])
        residual = None if residual is None else image(residual)
        op, args = ops.conv2d, (image(x), weight, bias, residual, act, (1, 1), (0, 0), (1, 1), 1)
    elif old.target is ops.norm:
        op, args = ops.channel_norm, (image(old.args[0]), *old.args[1:5])
    else:
        op, args = old.target, tuple(image(a) if is_node(a) else a for a in old.args)
    with exported.graph.inserting_before(before):
        new = exported.graph.call_function(op, args)
    new.meta["val"] = old.meta["val"].permute(TO_IMAGES)
    return new
