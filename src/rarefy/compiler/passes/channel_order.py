"""Passes for operators that take channels of images, or change their order: slices, chunks, channel shuffles."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import VIEWS, ExportedGraph, Node, add_constant, aten, is_node, replace_node, same, shape
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.compiler.passes.linear import SPLITS
from rarefy.compiler.passes.matchers import is_image, is_of_images, swaps

SHUFFLES = (aten.channel_shuffle.default, aten.native_channel_shuffle.default)


def convert_selection(exported: ExportedGraph, node: Node) -> None:
    """Convert slices, splits, chunks and shuffles (Zhang et al. 2018) of the channels of an image, shuffles also as
    view, transpose and view; slices that other operators of the engine read."""
    x, groups = _shuffle(node)
    if x is not None:
        _select(exported, node, x, torch.arange(shape(node)[1]).view(groups, -1).T.flatten())
        return
    x, start, end, stride = _slice(node)
    if x is None or not is_image(node) or not is_image(x) or not is_of_images(x) or not isinstance(shape(x)[1], int):
        return
    order = torch.arange(shape(x)[1])[start:end:stride]
    if len(order) and len(order) == shape(node)[1] and any(map(_is_read_natively, node.users)):
        _select(exported, node, x, order)


def _is_read_natively(user: Node) -> bool:
    """Return whether an operator of the engine reads what a node makes, perhaps through a selection or views."""
    return user.target in BY_TARGET or user.target in (*VIEWS, aten.slice.Tensor, *SPLITS, *SHUFFLES)


def _shuffle(node: Node) -> tuple[Any, int]:
    """Return the image whose channels a node shuffles, and the number of groups; (None, 0) for anything else."""
    if not is_image(node) or not isinstance(shape(node)[1], int):
        return None, 0
    if node.target in SHUFFLES:
        return (node.args[0], node.args[1]) if is_of_images(node.args[0]) else (None, 0)
    swapped: Any = node.args[0] if node.target in VIEWS else None
    if not is_node(swapped) or len(shape(swapped)) != 5 or not swaps(swapped, 1, 2):
        return None, 0
    split = swapped.args[0]
    x = split.args[0] if split.target in (*VIEWS, aten.unflatten.int) else None
    if x is None or not is_image(x) or not is_of_images(x) or not same(shape(x), shape(node)):
        return None, 0
    batch, groups, _, *size = shape(split)
    image = same((batch, *size), (shape(x)[0], *shape(x)[2:]))
    return (x, groups) if image else (None, 0)


def _slice(node: Node) -> tuple[Any, Any, Any, Any]:
    """Return x, start, end and stride if a node is x[:, start:end:stride]; else (None, 0, 0, 1)."""
    if node.target is aten.slice.Tensor and len(node.args) > 1 and node.args[1] in (1, -3):
        x, start, end, stride = (node.args[0], *node.args[2:], *(None, None, 1)[len(node.args) - 2 :])
        if all(i is None or isinstance(i, int) for i in (start, end)):
            return x, start, end, stride
    split: Any = node.args[0] if node.target is operator.getitem else None
    if not is_node(split) or split.target not in SPLITS or (*split.args, 0)[2] not in (1, -3):
        return None, 0, 0, 1
    widths = [v.shape[1] for v in split.meta["val"]]
    if not all(isinstance(w, int) for w in widths):
        return None, 0, 0, 1
    start = sum(widths[: node.args[1]])
    return split.args[0], start, start + widths[node.args[1]], 1


def _select(exported: ExportedGraph, node: Node, x: Node, order: Tensor) -> None:
    """Replace a node by a selection of channels, from the image before an earlier selection."""
    if x.target is ops.select_channels:
        x, order = x.args[0], exported.constants[x.args[1].name][order]
    replace_node(exported, node, ops.select_channels, x, add_constant(exported, f"{node.name}_order", order))
