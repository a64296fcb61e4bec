"""The pass that moves activations and residual sums into the operator before them."""

from __future__ import annotations

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import ExportedGraph, Node, keep_layer, replace_node
from rarefy.compiler.operators.table import BY_TARGET


def fuse_epilogue(exported: ExportedGraph, node: Node) -> None:
    """Fuse an activation or a sum into the operator that computes its input, if nothing else reads that."""
    if node.target is ops.activation:
        y, act = node.args
        if len(y.users) != 1:
            return
        if _has_epilogue(y) and y.args[4] is None:
            keep_layer(replace_node(exported, node, y.target, *y.args[:4], act, *y.args[5:]), y)
        elif y.target is ops.add and y.args[2] is None:
            replace_node(exported, node, ops.add, *y.args[:2], act)
        elif y.target is ops.channel_affine and y.args[3] is None:
            replace_node(exported, node, ops.channel_affine, *y.args[:3], act)
    elif node.target is ops.add:
        a, b, act = node.args
        for y, residual in ((a, b), (b, a)):
            if _has_epilogue(y) and len(y.users) == 1 and y.args[3:5] == (None, None) and residual is not y:
                keep_layer(replace_node(exported, node, y.target, *y.args[:3], residual, act, *y.args[5:]), y)
                return
    elif node.target is ops.mul and node.args[2] is None:
        for y, factor in (node.args[:2], node.args[1::-1]):
            if y.target is ops.activation and len(y.users) == 1:
                replace_node(exported, node, ops.mul, y.args[0], factor, y.args[1])
                return


def _has_epilogue(node: Node) -> bool:
    return node.target in BY_TARGET and BY_TARGET[node.target].epilogue
