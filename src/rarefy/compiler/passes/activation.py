"""Rules for formulas that models write out: GELU, SiLU, LayerNorm, scales of layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import ExportedGraph, Node, aten, is_node, kind_of, replace_node, same, shape
from rarefy.compiler.passes.linear import scale_rows

CLOSE = 1e-3  # of constants, which some models round to three digits
QUICK = 1.702  # of sigmoid in the GELU of OpenAI's CLIP


def factors(node: Node) -> tuple[float, list[Node]]:
    """Return the number and the values whose product a node is; what others read too stays whole."""
    number: Any = 1.0
    found, left = [], [node]
    while left:
        n = left.pop()
        a, b = n.args[:2] if n.op == "call_function" and len(n.args) > 1 else (None, None)
        own = n is node or len(n.users) == 1
        if own and n.target is aten.mul.Tensor:
            for x in (a, b):
                if is_node(x):
                    left.append(x)
                else:
                    number *= x
        elif own and n.target is aten.div.Tensor and not is_node(b) and b and not n.kwargs:
            number, left = number / b, [*left, a]
        elif own and n.target is aten.pow.Tensor_Scalar and b in (2, 3):
            found += [a] * int(b)
        else:
            found.append(n)
    return number, found


def _is(node: Any, number: float, values: list[Node]) -> bool:
    """Whether a node is this number times these values."""
    if not is_node(node):
        return False
    by, found = factors(node)
    return abs(by - number) <= CLOSE * number and sorted(map(id, found)) == sorted(map(id, values))


def _more_than(node: Any, number: float) -> Any:
    """x of x + number, None of anything else."""
    if not is_node(node) or node.target is not aten.add.Tensor or node.kwargs:
        return None
    a, b = node.args
    return a if not is_node(b) and b == number else b if not is_node(a) and a == number else None


def fuse_gelu_silu(t: ExportedGraph, node: Node) -> None:
    """x (1 + erf(x / sqrt 2)) / 2, the same with tanh, and x sigmoid(x)."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or kind_of(node) != torch.float32:
        return
    number, found = factors(node)
    if len(found) != 2:
        return
    for x, y in (found, found[::-1]):
        if abs(number - 1) <= CLOSE and y.target is aten.sigmoid.default and y.args[0] is x:
            replace_node(t, node, ops.activation, x, "silu")
            return
        inner: Any = _more_than(y, 1)
        act = None if abs(number - 0.5) > CLOSE or inner is None else _gelu(inner, x)
        if act is not None:
            replace_node(t, node, ops.activation, x, act)
            return


def _gelu(inner: Node, x: Node) -> str | None:
    """Which GELU of x this erf or tanh belongs to (Hendrycks and Gimpel 2016)."""
    if inner.target is aten.erf.default and _is(inner.args[0], math.sqrt(0.5), [x]):
        return "gelu"
    if inner.target is not aten.tanh.default:
        return None
    number, found = factors(inner.args[0])
    if abs(number - math.sqrt(2 / math.pi)) > CLOSE:
        return None
    if len(found) == 1 and found[0].target is aten.add.Tensor and not found[0].kwargs:
        a, b = found[0].args
        return "gelu_tanh" if any(p is x and _is(q, 0.044715, [x, x, x]) for p, q in ((a, b), (b, a))) else None
    rest = next((q for p, q in (found, found[::-1]) if p is x), None) if len(found) == 2 else None
    return "gelu_tanh" if rest is not None and _is(_more_than(rest, 1), 0.044715, [x, x]) else None


def fuse_quick_gelu(t: ExportedGraph, node: Node) -> None:
    """x sigmoid(1.702 x) between two products: SiLU, and the number goes into both weights."""
    if node.target is not ops.mul or node.args[2] is not None or len(node.users) != 1:
        return
    y = next(iter(node.users))
    for x, chance in (node.args[:2], node.args[1::-1]):
        inner = chance.args[0] if chance.target is aten.sigmoid.default and len(chance.users) == 1 else None
        if not _is(inner, QUICK, [x]) or x.target is not ops.linear or set(x.users) != {inner, node}:
            continue
        if y.target is ops.linear and y.args[0] is node and x.args[3:] == (None, None):
            made = scale_rows(t, node, x.args[1:3], QUICK)
            new = replace_node(t, node, ops.linear, x.args[0], *made, None, "silu")
            w = scale_rows(t, y, y.args[1:2], 1 / QUICK)
            replace_node(t, y, ops.linear, new, *w, *y.args[2:])
            return


ACTIVATIONS = {
    aten.relu.default: "relu", aten.silu.default: "silu",
}  # fmt: skip


def _act(node: Node) -> str | None:
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return ACTIVATIONS.get(node.target)


def convert_pointwise(t: ExportedGraph, node: Node) -> None:
    """Activations, and sums and products of two values of one shape."""
    act = _act(node)
    if act is not None and kind_of(node) == torch.float32:
        replace_node(t, node, ops.activation, node.args[0], act)
    if node.target in (aten.add.Tensor, aten.mul.Tensor) and kind_of(node) == torch.float32:
        a, b = node.args
        whole = isinstance(a, fx.Node) and isinstance(b, fx.Node) and same(shape(a), shape(b)) and not node.kwargs
        if whole and kind_of(a) == kind_of(b) == torch.float32 and not {a.name, b.name} & set(t.constants):
            replace_node(t, node, ops.mul if node.target is aten.mul.Tensor else ops.add, a, b, None)
