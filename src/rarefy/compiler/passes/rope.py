"""The pass for rotary position embeddings."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import ExportedGraph, Node, aten, dtype_of, insert_before, replace_uses, same, shape
from rarefy.compiler.passes.matchers import args_of_pair, before_head_split, size_node

HALVES: dict[Any, Any] = {aten.chunk.default: lambda half: 2, aten.split.Tensor: lambda half: half}  # second argument
INSERTED = "rope"  # a note on nodes that several layers share


def fuse_rope(exported: ExportedGraph, node: Node) -> None:
    """Fuse x cos + cat(-second half of x, first half of x) sin, for x that was split into heads."""
    a, b = args_of_pair(node, aten.add.Tensor)
    for plain, rotated in ((a, b), (b, a)):
        for x, cos in _factor_pairs(plain):
            for halves, sin in _factor_pairs(rotated):
                y = before_head_split(x)
                if y is None or not _swaps_halves(halves, x):
                    continue
                angles = [_angles(exported, node, a, x) for a in (cos, sin)]
                if None not in angles:
                    heads, head_dim = shape(x)[1], shape(x)[3]
                    new = insert_before(exported, node, ops.rope, y, *angles, heads)
                    split = insert_before(exported, node, aten.unflatten.int, new, 2, [heads, head_dim])
                    replace_uses(exported, node, insert_before(exported, node, aten.transpose.int, split, 1, 2))
                    return


def _factor_pairs(node: Any) -> list[tuple[Any, Any]]:
    """Return the two factors of a product in both orders, [] for anything else."""
    a, b = args_of_pair(node, aten.mul.Tensor)
    return [] if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) else [(a, b), (b, a)]


def _swaps_halves(node: Node, x: Node) -> bool:
    """Return whether a node is cat([-x[half:], x[:half]])."""
    if node.target is not aten.cat.default or len(node.args[0]) != 2 or (*node.args, 0)[1] not in (-1, 3):
        return False
    negated, first = node.args[0]
    return negated.target is aten.neg.default and _half(negated.args[0], x) == 1 and _half(first, x) == 0


def _half(node: Node, x: Node) -> int | None:
    """Return which half of the features of x a slice or a part of a chunk is, None for anything else."""
    half = shape(x)[3] // 2
    if node.target is operator.getitem:
        parts, i = node.args
        matches = parts.target in HALVES and parts.args[0] is x and (*parts.args, 0)[2] in (-1, 3)
        return i if matches and parts.args[1] == HALVES[parts.target](half) and shape(x)[3] == 2 * half else None
    if node.target is not aten.slice.Tensor or len(node.args) != 4 or node.args[:2] != (x, 3):
        return None
    start, end = node.args[2:]
    return 0 if (start, end) == (0, half) else 1 if start == half and end >= 2 * half else None


def _angles(exported: ExportedGraph, before: Node, node: Node, x: Node) -> Node | None:
    """Return angles [batch, tokens, head_dim] for a node [batch or 1, 1, tokens, head_dim] that multiplies heads x."""
    batch, _, tokens, head_dim = shape(x)
    if len(shape(node)) != 4 or dtype_of(node) != torch.float32 or not same(shape(node)[1:], (1, tokens, head_dim)):
        return None
    unsqueezed = node.target is aten.unsqueeze.default and node.args[1] in (1, -3)
    angles = node.args[0] if unsqueezed else _known_user(node, aten.squeeze.dim)
    if angles is None:
        angles = insert_before(exported, before, aten.squeeze.dim, node, 1)
        angles.meta[INSERTED] = True
    if same(shape(angles)[:1], (batch,)):
        return angles
    known = _known_user(angles, aten.repeat.default, batch)
    count = size_node(exported, before, batch) if known is None else None
    if known is not None or shape(angles)[0] != 1 or count is None:
        return known
    with exported.graph.inserting_before(before):
        repeated = exported.graph.call_function(aten.repeat.default, (angles, [count, 1, 1]))
    repeated.meta[INSERTED] = True
    repeated.meta["val"] = x.meta["val"].new_empty((batch, tokens, head_dim))
    return repeated


def _known_user(node: Node, target: Any, batch: Any = None) -> Node | None:
    """Return what an earlier match of this pass inserted after a node, for a batch of that size if one is given."""
    users = (u for u in node.users if u.target is target and u.meta.get(INSERTED))
    return next((u for u in users if batch is None or same(shape(u)[:1], (batch,))), None)
