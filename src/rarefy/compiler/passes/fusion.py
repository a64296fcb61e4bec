"""The fusion pass: activations and residual sums move into the operator before them."""

from __future__ import annotations

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import ExportedGraph, Node, replace_node

FULL = (ops.linear, ops.conv2d)  # words that take what is added and what follows


def fuse_epilogue(t: ExportedGraph, node: Node) -> None:
    """Activations and sums that alone read a product go into it."""
    if node.target is ops.activation:
        y = node.args[0]
        alone = len(y.users) == 1
        if alone and y.target in FULL and y.args[4] is None:
            replace_node(t, node, y.target, *y.args[:4], node.args[1], *y.args[5:])
        elif alone and y.target is ops.add and y.args[2] is None:
            replace_node(t, node, ops.add, *y.args[:2], node.args[1])
    elif node.target is ops.add:
        a, b, act = node.args
        for y, more in ((a, b), (b, a)):
            if y.target in FULL and len(y.users) == 1 and y.args[3:5] == (None, None) and more is not y:
                replace_node(t, node, y.target, *y.args[:3], more, act, *y.args[5:])
                return
    elif node.target is ops.mul and node.args[2] is None:
        for y, more in (node.args[:2], node.args[1::-1]):
            if y.target is ops.activation and len(y.users) == 1:
                replace_node(t, node, ops.mul, y.args[0], more, y.args[1])
                return
