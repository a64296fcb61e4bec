"""The pass for rotary position embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import ExportedGraph, Node, aten, dtype_of, insert_before, replace_uses, same, shape
from rarefy.compiler.passes.matchers import args_of_pair, before_head_split


def fuse_rope(exported: ExportedGraph, node: Node) -> None:
    """Fuse x cos + cat(-second half of x, first half of x) sin, for x that was split into heads."""
    a, b = args_of_pair(node, aten.add.Tensor)
    for plain, rotated in ((a, b), (b, a)):
        for x, cos in _factor_pairs(plain):
            for halves, sin in _factor_pairs(rotated):
                y = before_head_split(x)
                if y is not None and _swaps_halves(halves, x) and _are_angles(cos, x) and _are_angles(sin, x):
                    heads, head_dim = shape(x)[1], shape(x)[3]
                    new = insert_before(exported, node, ops.rope, y, cos.args[0], sin.args[0], heads)
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
    slices = negated.args[0] if negated.target is aten.neg.default else None, first
    if any(n is None or n.target is not aten.slice.Tensor for n in slices):
        return False
    half, second = shape(x)[3] // 2, negated.args[0]
    return (
        first.args == (x, 3, 0, half)
        and second.args[:3] == (x, 3, half)
        and second.args[3] >= 2 * half
        and len(second.args) == 4
    )


def _are_angles(node: Node, x: Node) -> bool:
    """Return whether a node is [batch, 1, tokens, head_dim], unsqueezed from [batch, tokens, head_dim]."""
    if node.target is not aten.unsqueeze.default or node.args[1] != 1 or dtype_of(node) != torch.float32:
        return False
    angles, heads = shape(node.args[0]), shape(x)
    return len(angles) == 3 and same(angles, (heads[0], heads[2], heads[3]))
