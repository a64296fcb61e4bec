"""Passes that remove operators without effect and fold constants."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from rarefy.common.errors import ModelError
from rarefy.compiler.fx_utils import (
    VIEWS,
    ExportedGraph,
    Node,
    add_constant,
    aten,
    dtype_of,
    is_node,
    replace_uses,
    same,
    shape,
)
from rarefy.compiler.passes.matchers import constant_of

SLICE_END = (1 << 63) - 1  # end of a slice of everything
MAX_FOLDED = 1 << 26  # numbers of a constant that is computed from others
ASSERTIONS = (
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default,
)  # fmt: skip
NOOPS = (  # where the type stays
    aten.dropout.default, aten.alias.default, aten.contiguous.default, aten.clone.default, aten.detach.default,
    aten.lift_fresh_copy.default, aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
    aten.type_as.default,
)  # fmt: skip
COPIES = (aten.clone.default, aten.contiguous.default, aten.lift_fresh_copy.default, aten._to_copy.default)
OVERWRITES = (aten.copy.default, aten.slice_scatter.default)  # of a tensor by a second one, maybe all of it
FACTORS = (aten.mul.Tensor, aten.div.Tensor)
FILLED = {  # calls that need only the type of their first argument
    aten.new_zeros.default: 0.0, aten.zeros_like.default: 0.0, aten.new_ones.default: 1.0, aten.ones_like.default: 1.0,
}  # fmt: skip


def remove_noop(exported: ExportedGraph, node: Node) -> None:
    """Remove assertions, copies, conversions to the same type, full slices, views to the same shape, and tensors that
    are overwritten completely; write views and transposes in one way."""
    if node.target in ASSERTIONS:
        exported.graph.erase_node(node)
        return
    if node.target in VIEWS:
        node.target = aten.reshape.default  # a view may fail once a copy before it is removed
    _write_in_one_way(node)
    if node.target in OVERWRITES:
        x, source, *rest = node.args
        backwards = len(rest) == 4 and rest[3] != 1
        alike = same(shape(x), shape(source)) and dtype_of(x) == dtype_of(source) and not backwards
        if alike and not node.kwargs and not _would_share(node, source):
            replace_uses(exported, node, source)
        return
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or dtype_of(x) != dtype_of(node):
        return
    if node.target is aten.dropout.default and node.args[2]:
        raise ModelError("the model has active dropout: call eval() first")
    is_slice = node.target is aten.slice.Tensor and (*node.args, 1)[2] == 0
    whole = is_slice and len(node.args) == 4 and node.args[3] == SLICE_END
    times_one = node.target is aten.mul.Tensor and isinstance(node.args[1], int | float) and node.args[1] == 1
    same_view = node.target in (*VIEWS, aten.adaptive_avg_pool2d.default) and same(shape(node), shape(x))
    if (times_one or node.target in COPIES) and _would_share(node, x):
        return
    if whole or times_one or node.target in NOOPS or same_view:
        replace_uses(exported, node, x)


def _would_share(copy: Node, x: Node) -> bool:
    """Return whether the model returns both a copy and its source, or views of them, which share no memory."""
    base = x
    while _is_view(base) and is_node(base.args[0]):
        base = base.args[0]
    return _is_returned(copy, None) and _is_returned(base, copy)


def _is_returned(node: Node, without: Node | None) -> bool:
    """Return whether the model returns a value or a view of it; views of `without` do not count."""
    users = [u for u in node.users if u is not without]
    return any(u.op == "output" or (_is_view(u) and u.args[0] is node and _is_returned(u, without)) for u in users)


def _is_view(node: Node) -> bool:
    """Return whether an operator may return memory of its input."""
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return node.target in (*NOOPS, operator.getitem) or any(r.alias_info is not None for r in returns)


def _write_in_one_way(node: Node) -> None:
    """Write a permutation of two dimensions as a transpose, and a squeeze of one as such."""
    if node.target is aten.mT.default:
        node.target, node.args = aten.transpose.int, (node.args[0], -2, -1)
    elif node.target is aten.permute.default:
        order = [d % len(node.args[1]) for d in node.args[1]]
        moved = [i for i, d in enumerate(order) if i != d]
        if len(moved) == 2:
            node.target, node.args = aten.transpose.int, (node.args[0], *moved)
    elif node.target is aten.squeeze.dims and len(node.args[1]) == 1:
        node.target, node.args = aten.squeeze.dim, (node.args[0], node.args[1][0])


def fold_constants(exported: ExportedGraph, node: Node) -> None:
    """Compute nodes that read only constants, and tensors of zeros or ones; factors of one element become numbers."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return
    known = all(n.name in exported.constants for n in node.all_input_nodes)
    if node.target in FACTORS and not known:
        _factor_to_number(exported, node)
    if not str(value.numel()).isdigit() or value.numel() > MAX_FOLDED:
        return
    if node.target in FILLED and node.all_input_nodes:
        filled = torch.full([int(s) for s in value.shape], FILLED[node.target], dtype=torch.float32).to(value.dtype)
        replace_uses(exported, node, add_constant(exported, f"{node.name}_known", filled))
        return
    if not known or not (node.all_input_nodes or node.target is aten.scalar_tensor.default):
        return
    if getattr(node.target, "tags", ()) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: exported.constants[n.name])
    replace_uses(exported, node, add_constant(exported, f"{node.name}_known", node.target(*args, **kwargs)))


def _factor_to_number(exported: ExportedGraph, node: Node) -> None:
    """Multiply or divide by a number, not by a constant of one element."""
    for i, j in ((0, 1), (1, 0))[: 2 if node.target is aten.mul.Tensor else 1]:
        x, factor = node.args[i], constant_of(exported, node.args[j])
        if factor is None or factor.numel() != 1 or not is_node(x) or node.kwargs:
            continue
        if same(shape(x), shape(node)) and dtype_of(x) == dtype_of(node) == factor.dtype == torch.float32:
            node.args = (x, float(factor))
            return
