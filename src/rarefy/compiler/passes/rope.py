"""The pass that recognizes rotary position embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import ExportedGraph, Node, aten, insert_before, kind_of, same, shape
from rarefy.compiler.passes.matchers import args_of_pair, split


def fuse_rope(t: ExportedGraph, node: Node) -> None:
    """x cos + cat(-x's second half, its first) sin, of x that was split into heads."""
    a, b = args_of_pair(node, aten.add.Tensor)
    for plain, turned in ((a, b), (b, a)):
        for x, cosine in _either(plain):
            for halves, sine in _either(turned):
                y = split(x)
                if y is not None and _turned(halves, x) and _angles(cosine, x) and _angles(sine, x):
                    many, width = shape(x)[1], shape(x)[3]
                    new = insert_before(t, node, ops.rope, y, cosine.args[0], sine.args[0], many)
                    back = insert_before(t, node, aten.unflatten.int, new, 2, [many, width])
                    node.replace_all_uses_with(insert_before(t, node, aten.transpose.int, back, 1, 2))
                    t.graph.erase_node(node)
                    return


def _either(node: Any) -> list[tuple[Any, Any]]:
    a, b = args_of_pair(node, aten.mul.Tensor)
    return [] if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) else [(a, b), (b, a)]


def _turned(node: Node, x: Node) -> bool:
    """cat([-x[half:], x[:half]])"""
    if node.target is not aten.cat.default or len(node.args[0]) != 2 or (*node.args, 0)[1] not in (-1, 3):
        return False
    back, front = node.args[0]
    if back.target is not aten.neg.default or any(n.target is not aten.slice.Tensor for n in (back.args[0], front)):
        return False
    half, last = shape(x)[3] // 2, back.args[0]
    return (
        front.args == (x, 3, 0, half)
        and last.args[:3] == (x, 3, half)
        and last.args[3] >= 2 * half
        and len(last.args) == 4
    )


def _angles(node: Node, x: Node) -> bool:
    """[batch, 1, tokens, features of a head], out of [batch, tokens, features of a head]."""
    if node.target is not aten.unsqueeze.default or node.args[1] != 1 or kind_of(node) != torch.float32:
        return False
    small, whole = shape(node.args[0]), shape(x)
    return len(small) == 3 and same(small, (whole[0], whole[2], whole[3]))
