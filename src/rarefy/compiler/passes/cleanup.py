"""Passes that remove operators without effect and fold constants."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from rarefy.common.errors import ModelError
from rarefy.compiler.fx_utils import VIEWS, ExportedGraph, Node, add_constant, aten, kind_of, same, shape

WHOLE = (1 << 63) - 1  # where a slice of all ends


CHECKS = (
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten.sym_constrain_range_for_size.default,
)  # fmt: skip


NOTHING = (
    aten.dropout.default, aten.alias.default, aten.contiguous.default, aten.clone.default, aten.detach.default,
    aten.lift_fresh_copy.default, aten._to_copy.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
    aten.type_as.default,
)  # fmt: skip


def remove_noop(t: ExportedGraph, node: Node) -> None:
    """What does nothing to values."""
    if node.target in CHECKS:
        t.graph.erase_node(node)
        return
    if node.target in VIEWS:
        node.target = aten.reshape.default  # what was contiguous by a call that does nothing else may not be so now
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or kind_of(x) != kind_of(node):
        return
    if node.target is aten.slice.Tensor and (*node.args, 1)[2] == 0 and len(node.args) == 4 and node.args[3] == WHOLE:
        node.replace_all_uses_with(x)
        t.graph.erase_node(node)
        return
    if node.target is aten.dropout.default and node.args[2]:
        raise ModelError("the model drops out at random: call eval() first")
    by_one = node.target is aten.mul.Tensor and isinstance(node.args[1], int | float) and node.args[1] == 1
    if by_one or node.target in NOTHING or (node.target in VIEWS and same(shape(node), shape(x))):
        node.replace_all_uses_with(x)
        t.graph.erase_node(node)


MOST_FOLDED = 1 << 26  # numbers of a constant that is made of others


FILLED = {  # calls that take of their first argument its type alone
    aten.new_zeros.default: 0.0, aten.zeros_like.default: 0.0, aten.new_ones.default: 1.0, aten.ones_like.default: 1.0,
}  # fmt: skip


def fold_constants(t: ExportedGraph, node: Node) -> None:
    """What follows from constants alone is one, and so is what is filled with zeros or ones."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not node.all_input_nodes or not str(value.numel()).isdigit():
        return
    if node.target in FILLED and value.numel() <= MOST_FOLDED:
        filled = torch.full([int(s) for s in value.shape], FILLED[node.target]).to(value.dtype)
        node.replace_all_uses_with(add_constant(t, f"{node.name}_known", filled))
        t.graph.erase_node(node)
        return
    if getattr(node.target, "tags", ()) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return
    if value.numel() > MOST_FOLDED or any(n.name not in t.constants for n in node.all_input_nodes):
        return
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: t.constants[n.name])
    made = add_constant(t, f"{node.name}_known", node.target(*args, **kwargs))
    node.replace_all_uses_with(made)
    t.graph.erase_node(node)
