"""Passes for linear layers and embeddings: recognize them, split them, fold scales, remove views around them."""

from __future__ import annotations

import operator
from math import prod
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
    dtype_of,
    insert_before,
    is_node,
    keep_layer,
    replace_node,
    replace_uses,
    same,
    shape,
)
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.compiler.passes.matchers import args_of_pair, constant_of, swaps_heads_and_tokens
from rarefy.runtime.sparse_layers import Sparse, from_spec

SPLITS = (aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default)
MAX_BETWEEN_VIEWS = 64  # operators


def convert_embedding(exported: ExportedGraph, node: Node) -> None:
    """Convert an embedding with a constant weight."""
    if node.target is aten.embedding.default and dtype_of(node) == torch.float32:
        weight, ids = node.args[:2]
        if weight.name in exported.constants:
            replace_node(exported, node, ops.embedding, ids, weight)


def convert_linear(exported: ExportedGraph, node: Node) -> None:
    """Convert a linear layer with a constant weight, also one that `accelerate_` has replaced."""
    constants = exported.constants
    if node.target is aten.linear.default:
        x, w, bias = (*node.args, None)[:3]
        constant = all(n is None or n.name in constants for n in (w, bias))
        if constant and dtype_of(node) == torch.float32:
            replace_node(exported, node, ops.linear, x, w, bias, None, None)
    if node.target is aten.addmm.default and not node.kwargs and dtype_of(node) == torch.float32:
        bias, x, w = node.args
        if {bias.name, w.name} <= constants.keys() and len(shape(bias)) == 1:
            weight = add_constant(exported, f"{w.name}_t", constants[w.name].t())
            replace_node(exported, node, ops.linear, x, weight, bias, None, None)
    if node.target is torch.ops.rarefy.sparse.default:
        _unpack_sparse(exported, node)


def _unpack_sparse(exported: ExportedGraph, node: Node) -> None:
    """Unpack the weight of a layer that `accelerate_` has replaced; it is packed again for the whole model."""
    x, parts, bias, spec = node.args
    layer = from_spec([exported.constants[p.name] for p in parts], None, spec)
    if len(layer.shape) != 2 or layer.int8_inputs or _is_quantized(layer):
        return
    with exported.graph.inserting_before(next(iter(exported.graph.nodes))):
        w = exported.graph.placeholder(f"{parts[0].name}_unpacked")
    exported.constants[w.name] = w.meta["val"] = layer.weight.float()
    replace_node(exported, node, ops.linear, x, w, bias, None, layer.activation)


def _is_quantized(layer: Sparse) -> bool:
    return any(fields.get("kind", "fp32") != "fp32" for _, fields in layer.formats)


def remove_views_around_linear(exported: ExportedGraph, node: Node) -> None:
    """Replace view(linear(view(x))) by linear(x) where the views change leading dimensions alone.

    A view that also joins heads [batch, tokens, heads, head_dim] is left with that.
    """
    if node.target not in VIEWS or not isinstance(node.args[0], fx.Node):
        return
    y = node.args[0]
    if y.target is not ops.linear or len(y.users) != 1 or y.args[3] is not None:
        return
    x = y.args[0]
    source = x.args[0] if x.target in VIEWS else None
    if source is None or shape(node)[-1] != shape(y)[-1]:
        return
    leading = shape(node)[:-1]
    if shape(x)[-1] == shape(source)[-1] and same(shape(source)[:-1], leading):
        replace_node(exported, node, ops.linear, source, *y.args[1:])
        return
    heads = shape(source)[2:]
    if swaps_heads_and_tokens(source) and same(shape(source)[:2], leading) and prod(heads) == shape(x)[-1]:
        joined = insert_before(exported, node, aten.flatten.using_ints, source, 2, 3)
        replace_node(exported, node, ops.linear, joined, *y.args[1:])


def fold_bias(exported: ExportedGraph, node: Node) -> None:
    """Fold a constant for each output that is added to a linear layer's outputs into its bias."""
    for y, added in zip(*(args_of_pair(node, aten.add.Tensor)[::d] for d in (1, -1))):
        known = None if node.kwargs else constant_of(exported, added)
        if known is None or not is_node(y) or y.target is not ops.linear or len(y.users) != 1:
            continue
        x, w, bias, residual, act = y.args
        if (residual, act) == (None, None) and tuple(known.shape) == shape(y)[-1:] and known.dtype == torch.float32:
            whole = known if bias is None else known + exported.constants[bias.name]
            replace_node(
                exported, node, ops.linear, x, w, add_constant(exported, f"{node.name}_bias", whole), None, None
            )
            return


def split_linear_outputs(exported: ExportedGraph, node: Node) -> None:
    """Make a slice of a linear layer's outputs a linear layer of its own, as for queries, keys and values."""
    y, start, end = _output_slice(node)
    if y is None or y.target is not ops.linear or y.args[3] is not None:
        return
    replace_uses(exported, node, linear_of_rows(exported, node, y, slice(start, end)))


def linear_of_rows(exported: ExportedGraph, before: Node, y: Node, rows: Tensor | slice) -> Node:
    """Return a linear layer with some rows of another one's weight and bias, of the same input, before a node.

    A slice of the rows shares their memory.
    """
    x, *weights, _, act = y.args
    w, bias = (
        None if n is None else add_constant(exported, f"{before.name}_{part}", exported.constants[n.name][rows])
        for n, part in zip(weights, ("weight", "bias"))
    )
    with exported.graph.inserting_before(before):
        new = exported.graph.call_function(ops.linear, (x, w, bias, None, act))
    new.meta["val"] = y.meta["val"][..., : len(exported.constants[w.name])]  # type: ignore[union-attr]
    return keep_layer(new, y)


def _output_slice(node: Node) -> tuple[Any, int, int]:
    """Return y, start and end if a node is y[..., start:end] and all that read y take slices; else (None, 0, 0)."""
    if node.target is aten.slice.Tensor and _is_last_dim(node.args[0], node.args[1]):
        y = node.args[0]
        sliced = all(u.target is aten.slice.Tensor and _is_last_dim(y, u.args[1]) and len(u.args) == 4 for u in y.users)
        start, end = node.args[2:] if len(node.args) == 4 else (None, None)
        if sliced and isinstance(start, int) and isinstance(end, int) and 0 <= start < end:
            return y, start, min(end, shape(y)[-1])
        return None, 0, 0
    split = node.args[0] if node.target is operator.getitem else None
    if not isinstance(split, fx.Node) or split.target not in SPLITS:
        return None, 0, 0
    y, dim = split.args[0], (*split.args, 0)[2]
    if not isinstance(y, fx.Node) or len(y.users) != 1 or not _is_last_dim(y, dim):
        return None, 0, 0
    widths = [v.shape[-1] for v in split.meta["val"]]
    start = sum(widths[: node.args[1]])
    return y, start, start + widths[node.args[1]]


def _is_last_dim(y: Any, dim: Any) -> bool:
    return dim in (-1, len(shape(y)) - 1)


def scaled_weights(exported: ExportedGraph, node: Node, weights: Any, scale: Any) -> list[Node | None]:
    """Return weights and biases times a number, or times a number for each output; `node` names the new constants."""
    scaled: list[Node | None] = []
    for n in weights:
        w = None if n is None else exported.constants[n.name]
        factor = scale.view(-1, *[1] * (w.dim() - 1)) if isinstance(scale, Tensor) and w is not None else scale
        scaled.append(None if w is None else add_constant(exported, f"{node.name}_scaled", w * factor))
    return scaled


def fold_layer_scale(exported: ExportedGraph, node: Node) -> None:
    """Fold a constant for each output that multiplies a linear layer's outputs into its weight and bias."""
    if node.target is not aten.mul.Tensor or dtype_of(node) != torch.float32:
        return
    for y, scale in (node.args, node.args[::-1]):
        if not is_node(y) or not is_node(scale) or scale.name not in exported.constants:
            continue
        s = exported.constants[scale.name]
        plain = y.target is ops.linear and len(y.users) == 1 and y.args[3:] == (None, None)
        if plain and s.dim() and s.numel() == s.shape[-1] == shape(y)[-1] and s.dim() <= len(shape(y)):
            weights = scaled_weights(exported, node, y.args[1:3], s.flatten())
            replace_node(exported, node, ops.linear, y.args[0], *weights, None, None)
            return


def fold_batch_norm(exported: ExportedGraph, node: Node) -> None:
    """Fold a BatchNorm into the linear layer before it, also where a view joins batch and tokens between them."""
    if node.target is not aten.batch_norm.default or node.args[5] or dtype_of(node) != torch.float32:
        return
    joined, norm, eps = node.args[0], node.args[1:5], node.args[7]
    flat = joined.target is aten.flatten.using_ints or joined.target in VIEWS
    y = joined.args[0] if flat and len(joined.users) == 1 else joined
    if not is_node(y) or y.target is not ops.linear or y.args[3:] != (None, None):
        return
    if any(u is not joined and u is not node and not _reads_shape(u, y) for u in y.users):
        return
    values = [None if n is None else exported.constants.get(n.name) for n in norm]
    known = all(n is None or v is not None for n, v in zip(norm, values)) and None not in values[2:]
    if len(shape(node)) != 2 or shape(y)[-1] != shape(node)[-1] or not known:
        return
    gamma, beta, mean, var = values
    scale = torch.rsqrt(var + eps) * (1.0 if gamma is None else gamma)  # type: ignore[operator]
    weight, bias = scaled_weights(exported, node, y.args[1:3], scale)
    shift = -mean * scale + (0.0 if beta is None else beta)  # type: ignore[operator]
    shift = shift if bias is None else shift + exported.constants[bias.name]
    folded = replace_node(
        exported, y, ops.linear, y.args[0], weight, add_constant(exported, f"{node.name}_shift", shift), None, None
    )
    replace_uses(exported, node, folded if joined is y else joined)


def _reads_shape(user: Node, x: Node) -> bool:
    """Return whether an operator reads the shape of a value alone."""
    return user.target is aten.sym_size.int or (user.target is aten.reshape_as.default and user.args[0] is not x)


def undo_flatten(exported: ExportedGraph, node: Node) -> None:
    """Remove views that restore the shape which another view changed."""
    x: Any = node.args[0] if node.args else None
    if node.target not in (*VIEWS, aten.reshape_as.default) or not is_node(x):
        return
    if x.target in (*VIEWS, aten.flatten.using_ints) and same(shape(x.args[0]), shape(node)):
        replace_uses(exported, node, x.args[0])


def _is_per_row(node: Node) -> bool:
    return node.target in BY_TARGET and BY_TARGET[node.target].per_row


def remove_view_pairs(exported: ExportedGraph, node: Node) -> None:
    """Remove a view before and a view after operators on rows, where the second one undoes the first."""
    if node.target not in VIEWS or not isinstance(node.args[0], fx.Node) or not _is_per_row(node.args[0]):
        return
    inside: dict[Node, None] = {}
    last = node.args[0]
    if not same(shape(node)[-1:], shape(last)[-1:]) or not _collect_between(last, shape(node)[:-1], inside):
        return
    if any(u not in inside and u is not node for n in inside for u in n.users) or len(last.users) != 1:
        return
    new: dict[Node, Node] = {}
    for old in (n for n in list(exported.graph.nodes) if n in inside):  # in the graph's order
        values = BY_TARGET[old.target].tensors(old)
        args = [new.get(a, a.args[0]) if is_node(a) and a in values else a for a in old.args]
        with exported.graph.inserting_before(node):
            new[old] = exported.graph.call_function(old.target, tuple(args))
        first: Any = args[0]
        x = first.meta["val"]
        new[old].meta["val"] = x.new_empty((*x.shape[:-1], shape(old)[-1]))
        keep_layer(new[old], old)
    replace_uses(exported, node, new[last])


def _collect_between(node: Node, leading: tuple[Any, ...], inside: dict[Node, None]) -> bool:
    """Collect the operators from views of values with these leading dimensions to a node.

    Returns:
        Whether all inputs are such views.
    """
    inside[node] = None
    for x in BY_TARGET[node.target].tensors(node):
        if x in inside:
            continue
        if _is_per_row(x) and len(inside) < MAX_BETWEEN_VIEWS:
            if not _collect_between(x, leading, inside):
                return False
        elif x.target not in VIEWS or shape(x)[-1] != shape(x.args[0])[-1] or not same(shape(x.args[0])[:-1], leading):
            return False
    return True
