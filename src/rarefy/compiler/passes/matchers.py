"""Matchers that several passes use."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rarefy.compiler.fx_utils import VIEWS, ExportedGraph, Node, aten, dtype_of, is_node, same, shape
from rarefy.compiler.operators.spec import ELEMENTWISE, IMAGES, PIXELS, ROWS_TO_IMAGES
from rarefy.compiler.operators.table import BY_TARGET

SDPA = aten.scaled_dot_product_attention.default


def swaps(x: Node, a: int, b: int) -> bool:
    """Return whether a node swaps dimensions a and b, a < b, by a transpose or a permutation."""
    if x.target not in (aten.transpose.int, aten.permute.default):
        return False
    order = list(range(len(shape(x))))
    if x.target is aten.transpose.int:
        return sorted(d % len(order) for d in x.args[1:]) == [a, b]
    order[a], order[b] = b, a
    return [d % len(order) for d in x.args[1]] == order


def swaps_heads_and_tokens(x: Node) -> bool:
    """Return whether a node swaps dimensions 1 and 2, heads and tokens, of four."""
    return len(shape(x)) == 4 and swaps(x, 1, 2)


def before_head_split(x: Any) -> Any:
    """Return the value [batch, tokens, features] that was split into [batch, heads, tokens, head_dim], or None."""
    if not swaps_heads_and_tokens(x):
        return None
    v = x.args[0]
    if v.target not in (*VIEWS, aten.unflatten.int) or len(shape(v)) != 4 or len(shape(v.args[0])) != 3:
        return None
    return v.args[0] if same(shape(v)[:2], shape(v.args[0])[:2]) else None


def scaled_by_number(x: Node) -> tuple[Node, float] | None:
    """Return the node before x that multiplies by a number, and the number; only views and transposes may follow it."""
    while len(x.users) == 1:
        if x.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(x.args[1], float | int):
            return x, x.args[1] if x.target is aten.mul.Tensor else 1 / x.args[1]
        if not swaps(x, 1, 2) and x.target not in (*VIEWS, aten.unflatten.int):
            return None
        x = x.args[0]
    return None


def constant_of(exported: ExportedGraph, x: Any) -> Any:
    """Return the tensor of a constant, None for anything else."""
    return exported.constants.get(x.name) if is_node(x) else None


def args_of_pair(node: Any, target: Any) -> tuple[Any, Any]:
    """Return both arguments of a call of an operator, (None, None) for anything else."""
    matches = isinstance(node, fx.Node) and node.target is target and len(node.args) == 2
    return (node.args[0], node.args[1]) if matches else (None, None)


def only_user(node: Any) -> Any:
    """Return the only node that reads a node, None where there are none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def size_node(exported: ExportedGraph, before: Node, wanted: Any) -> Any:
    """Return a size as a number or as a node that reads it from an input's shape; None where no input has it."""
    if isinstance(wanted, int):
        return wanted
    for x in exported.inputs:
        for dim, size in enumerate(shape(x)):
            if str(size) == str(wanted):
                with exported.graph.inserting_before(before):
                    node = exported.graph.call_function(aten.sym_size.int, (x, dim))
                node.meta["val"] = size
                return node
    return None


def is_image(x: Any) -> bool:
    """Return whether an argument is a computed value [batch, channels, height, width] in fp32."""
    return is_node(x) and len(shape(x)) == 4 and dtype_of(x) == torch.float32


def is_of_images(x: Node) -> bool:
    """Return whether a value comes from an operator on images, through elementwise ones; rows can be 4D too."""
    while x.target in BY_TARGET:
        layout = BY_TARGET[x.target].layout
        if layout != ELEMENTWISE:
            return layout in (IMAGES, PIXELS, ROWS_TO_IMAGES)
        x = x.args[0]  # type: ignore[assignment]
    return False
