"""Passes for linear layers: recognize them, split and merge them, absorb scales, and handle embeddings."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import (
    VIEWS,
    ExportedGraph,
    Node,
    add_constant,
    aten,
    is_node,
    kind_of,
    replace_node,
    same,
    shape,
)
from rarefy.runtime.sparse_layers import Sparse, from_spec


def convert_linear(t: ExportedGraph, node: Node) -> None:
    """A product with a constant weight, dense or of a layer that runs sparse already."""
    if node.target is aten.linear.default:
        x, w, bias = (*node.args, None)[:3]
        fixed = all(n is None or n.name in t.constants for n in (w, bias))
        if fixed and kind_of(node) == torch.float32:
            replace_node(t, node, ops.linear, x, w, bias, None, None)
    if node.target is aten.addmm.default and not node.kwargs and kind_of(node) == torch.float32:
        bias, x, w = node.args
        if {bias.name, w.name} <= t.constants.keys() and len(shape(bias)) == 1:
            replace_node(
                t, node, ops.linear, x, add_constant(t, f"{w.name}_t", t.constants[w.name].t()), bias, None, None
            )
    if node.target is torch.ops.rarefy.sparse.default:
        _unpack_sparse(t, node)


def _unpack_sparse(t: ExportedGraph, node: Node) -> None:
    """A layer that runs sparse already: its weight once more, for the plan to pack."""
    x, parts, bias, about = node.args
    layer = from_spec([t.constants[p.name] for p in parts], None, about)
    if len(layer.shape) != 2 or layer.int8_inputs or _small(layer):
        return
    with t.graph.inserting_before(next(iter(t.graph.nodes))):
        w = t.graph.placeholder(f"{parts[0].name}_unpacked")
    t.constants[w.name] = w.meta["val"] = layer.weight.float()
    replace_node(t, node, ops.linear, x, w, bias, None, layer.activation)


def _small(layer: Sparse) -> bool:
    """Whether a layer's weight has other numbers than fp32."""
    return any(how.get("kind", "fp32") != "fp32" for _, how in layer.formats)


def remove_views_around_linear(t: ExportedGraph, node: Node) -> None:
    """view(product(view(x))): the product alone."""
    if node.target not in VIEWS or not isinstance(node.args[0], fx.Node):
        return
    y = node.args[0]
    if y.target is not ops.linear or len(y.users) != 1 or y.args[3] is not None:
        return
    x = y.args[0]
    wide = x.args[0] if x.target in VIEWS else None
    ends = wide is not None and shape(x)[-1] == shape(wide)[-1] and shape(node)[-1] == shape(y)[-1]
    if ends and same(shape(wide)[:-1], shape(node)[:-1]):
        replace_node(t, node, ops.linear, wide, *y.args[1:])


def scale_rows(t: ExportedGraph, at: Node, weights: Any, by: Any) -> list[Node | None]:
    """Weights and biases times a number, or each output by its own."""
    made: list[Node | None] = []
    for n in weights:
        w = None if n is None else t.constants[n.name]
        each = by.view(-1, *[1] * (w.dim() - 1)) if isinstance(by, Tensor) and w is not None else by
        made.append(None if w is None else add_constant(t, f"{at.name}_scaled", w * each))
    return made


def fold_layer_scale(t: ExportedGraph, node: Node) -> None:
    """A product's outputs times a constant each: that goes into its weight and bias."""
    if node.target is not aten.mul.Tensor or kind_of(node) != torch.float32:
        return
    for y, gain in (node.args, node.args[::-1]):
        if not is_node(y) or not is_node(gain) or gain.name not in t.constants:
            continue
        by = t.constants[gain.name]
        alone = y.target is ops.linear and len(y.users) == 1 and y.args[3:] == (None, None)
        if alone and by.dim() and by.numel() == by.shape[-1] == shape(y)[-1] and by.dim() <= len(shape(y)):
            replace_node(t, node, ops.linear, y.args[0], *scale_rows(t, node, y.args[1:3], by.flatten()), None, None)
            return


def convert_embedding(t: ExportedGraph, node: Node) -> None:
    """Rows of a constant weight."""
    if node.target is aten.embedding.default and kind_of(node) == torch.float32 and node.args[0].name in t.constants:
        replace_node(t, node, ops.embedding, node.args[1], node.args[0])


def split_linear_outputs(t: ExportedGraph, node: Node) -> None:
    """A piece of a product's outputs is a product with a piece of its weight: queries, keys and values in one."""
    y, start, end = _piece(node)
    if y is None or y.target is not ops.linear or y.args[3] is not None:
        return
    node.replace_all_uses_with(linear_of_rows(t, node, y, torch.arange(start, end)))
    t.graph.erase_node(node)


def linear_of_rows(t: ExportedGraph, before: Node, y: Node, rows: Tensor) -> Node:
    """Return the product of some of the rows of a product's weight and bias, of the same inputs, before a node."""
    x, *weights, _, act = y.args
    w, bias = (
        None if n is None else add_constant(t, f"{before.name}_{part}", t.constants[n.name][rows])
        for n, part in zip(weights, ("weight", "bias"))
    )
    with t.graph.inserting_before(before):
        new = t.graph.call_function(ops.linear, (x, w, bias, None, act))
    new.meta["val"] = y.meta["val"][..., : len(rows)]
    return new


def _piece(node: Node) -> tuple[Any, int, int]:
    """Of which node's last dimension this is a piece, from where to where, if all that read it take pieces."""
    if node.target is aten.slice.Tensor and _last(node.args[0], node.args[1]):
        y = node.args[0]
        whole = all(u.target is aten.slice.Tensor and _last(y, u.args[1]) and len(u.args) == 4 for u in y.users)
        start, end = node.args[2:] if len(node.args) == 4 else (None, None)
        if whole and isinstance(start, int) and isinstance(end, int) and 0 <= start < end:
            return y, start, min(end, shape(y)[-1])
        return None, 0, 0
    cut = node.args[0] if node.target is operator.getitem else None
    if not isinstance(cut, fx.Node) or cut.target not in (aten.split.Tensor, aten.chunk.default, SPLIT):
        return None, 0, 0
    y, dim = cut.args[0], (*cut.args, 0)[2]
    if not isinstance(y, fx.Node) or len(y.users) != 1 or not _last(y, dim):
        return None, 0, 0
    widths = [v.shape[-1] for v in cut.meta["val"]]
    start = sum(widths[: node.args[1]])
    return y, start, start + widths[node.args[1]]


SPLIT = aten.split_with_sizes.default


def _last(y: Any, dim: Any) -> bool:
    return dim in (-1, len(shape(y)) - 1)


KEEPING = (ops.linear, ops.norm, ops.add, ops.mul, ops.activation)  # whose outputs lie as their inputs do


def remove_view_pairs(t: ExportedGraph, node: Node) -> None:
    """Words between two views, the second of which takes back the first, need neither."""
    if node.target not in VIEWS or not isinstance(node.args[0], fx.Node) or node.args[0].target not in KEEPING:
        return
    inside: dict[Node, None] = {}
    if not _inside(node.args[0], shape(node)[:-1], inside) or shape(node)[-1] != shape(node.args[0])[-1]:
        return
    last = node.args[0]
    if any(u not in inside and u is not node for n in inside for u in n.users) or len(last.users) != 1:
        return
    made: dict[Node, Node] = {}
    for old in (n for n in list(t.graph.nodes) if n in inside):  # in the graph's order
        places = _tensors(old)
        args = [made.get(a, a.args[0]) if i in places and a is not None else a for i, a in enumerate(old.args)]
        with t.graph.inserting_before(node):
            made[old] = t.graph.call_function(old.target, tuple(args))
        first: Any = args[0]
        x = first.meta["val"]
        made[old].meta["val"] = x.new_empty((*x.shape[:-1], shape(old)[-1]))
    node.replace_all_uses_with(made[last])
    t.graph.erase_node(node)


def _tensors(node: Node) -> tuple[int, ...]:
    """Which arguments of a word are values."""
    return {ops.linear: (0, 3), ops.add: (0, 1), ops.mul: (0, 1)}.get(node.target, (0,))


def _inside(node: Node, lead: tuple[Any, ...], inside: dict[Node, None]) -> bool:
    """Gather the words that lead from views of values with this lead to a node; False where there is another way."""
    inside[node] = None
    for x in (node.args[i] for i in _tensors(node)):
        if x is None or x in inside:
            continue
        if x.target in KEEPING and len(inside) < MOST_INSIDE:
            if not _inside(x, lead, inside):
                return False
        elif x.target not in VIEWS or shape(x)[-1] != shape(x.args[0])[-1] or not same(shape(x.args[0])[:-1], lead):
            return False
    return True


MOST_INSIDE = 64  # words
