"""Passes for activations, also where a model writes GELU or SiLU as a formula."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import ExportedGraph, Node, aten, dtype_of, is_node, replace_node, same, shape
from rarefy.compiler.passes.linear import scaled_weights
from rarefy.compiler.passes.matchers import only_user

TOLERANCE = 1e-3  # of constants, which some models round to three digits
QUICK_GELU = 1.702  # factor of the GELU in OpenAI's CLIP, x sigmoid(1.702 x)
ACTIVATIONS = {
    aten.relu.default: "relu", aten.silu.default: "silu", aten.relu6.default: "relu6", aten.sigmoid.default: "sigmoid",
    aten.hardswish.default: "hardswish", aten.hardsigmoid.default: "hardsigmoid", aten.tanh.default: "tanh",
}  # fmt: skip
LIMITS = (aten.hardtanh.default, aten.clamp.default)  # ReLU6 between 0 and 6


def factors(node: Node) -> tuple[float, list[Node]]:
    """Return a number and the values whose product a node is. A product that other nodes read too is one value."""
    number: Any = 1.0
    values, queue = [], [node]
    while queue:
        n = queue.pop()
        a, b = n.args[:2] if n.op == "call_function" and len(n.args) > 1 else (None, None)
        inner = n is node or len(n.users) == 1
        if inner and n.target is aten.mul.Tensor:
            for x in (a, b):
                if is_node(x):
                    queue.append(x)
                else:
                    number *= x
        elif inner and n.target is aten.div.Tensor and not is_node(b) and b and not n.kwargs:
            number, queue = number / b, [*queue, a]
        elif inner and n.target is aten.pow.Tensor_Scalar and b in (2, 3):
            values += [a] * int(b)
        else:
            values.append(n)
    return number, values


def _is_product(node: Any, number: float, values: list[Node]) -> bool:
    """Return whether a node is this number times these values."""
    if not is_node(node):
        return False
    n, factors_ = factors(node)
    return abs(n - number) <= TOLERANCE * number and sorted(map(id, factors_)) == sorted(map(id, values))


def _minus(node: Any, number: float) -> Any:
    """Return x if a node is x + number, else None."""
    if not is_node(node) or node.target is not aten.add.Tensor or node.kwargs:
        return None
    a, b = node.args
    return a if not is_node(b) and b == number else b if not is_node(a) and a == number else None


def fuse_formulas(exported: ExportedGraph, node: Node) -> None:
    """Fuse x (1 + erf(x / sqrt 2)) / 2, the same with tanh, x sigmoid(x), and x relu6(x + 3) / 6."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or dtype_of(node) != torch.float32:
        return
    number, values = factors(node)
    if len(values) != 2:
        return
    for x, y in (values, values[::-1]):
        if abs(number - 1) <= TOLERANCE and y.target is aten.sigmoid.default and y.args[0] is x:
            replace_node(exported, node, ops.activation, x, "silu")
            return
        if abs(6 * number - 1) <= TOLERANCE and activation_of(y) == "relu6" and _minus(y.args[0], 3) is x:
            replace_node(exported, node, ops.activation, x, "hardswish")
            return
        inner: Any = _minus(y, 1)
        act = None if abs(number - 0.5) > TOLERANCE or inner is None else _gelu(inner, x)
        if act is not None:
            replace_node(exported, node, ops.activation, x, act)
            return


def _gelu(inner: Node, x: Node) -> str | None:
    """Return which GELU of x has this erf or tanh (Hendrycks and Gimpel 2016), None for neither."""
    if inner.target is aten.erf.default and _is_product(inner.args[0], math.sqrt(0.5), [x]):
        return "gelu"
    if inner.target is not aten.tanh.default:
        return None
    number, values = factors(inner.args[0])
    if abs(number - math.sqrt(2 / math.pi)) > TOLERANCE:
        return None
    if len(values) == 1 and values[0].target is aten.add.Tensor and not values[0].kwargs:
        a, b = values[0].args
        cubic = any(p is x and _is_product(q, 0.044715, [x, x, x]) for p, q in ((a, b), (b, a)))
        return "gelu_tanh" if cubic else None
    rest = next((q for p, q in (values, values[::-1]) if p is x), None) if len(values) == 2 else None
    return "gelu_tanh" if rest is not None and _is_product(_minus(rest, 1), 0.044715, [x, x]) else None


def fuse_quick_gelu(exported: ExportedGraph, node: Node) -> None:
    """Fuse x sigmoid(1.702 x) between two linear layers into SiLU, with the factor moved into both weights."""
    user = only_user(node)
    if node.target is not ops.mul or node.args[2] is not None or user is None:
        return
    for x, gate in (node.args[:2], node.args[1::-1]):
        is_sigmoid = gate.target is ops.activation and gate.args[1] == "sigmoid"
        inner = gate.args[0] if is_sigmoid and len(gate.users) == 1 else None
        if not _is_product(inner, QUICK_GELU, [x]) or x.target is not ops.linear or set(x.users) != {inner, node}:
            continue
        if user.target is ops.linear and user.args[0] is node and x.args[3:] == (None, None):
            weights = scaled_weights(exported, node, x.args[1:3], QUICK_GELU)
            act = replace_node(exported, node, ops.linear, x.args[0], *weights, None, "silu")
            weight = scaled_weights(exported, user, user.args[1:2], 1 / QUICK_GELU)
            replace_node(exported, user, ops.linear, act, *weight, *user.args[2:])
            return


def activation_of(node: Node) -> str | None:
    """Return which activation of its input a node is, None for other operators."""
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    if node.target in LIMITS and not node.kwargs and tuple(node.args[1:]) == (0, 6):
        return "relu6"
    return ACTIVATIONS.get(node.target)


def convert_pointwise(exported: ExportedGraph, node: Node) -> None:
    """Convert activations, and sums and products of two computed values of one shape."""
    act = activation_of(node)
    if act is not None and dtype_of(node) == torch.float32:
        replace_node(exported, node, ops.activation, node.args[0], act)
    if node.target in (aten.add.Tensor, aten.mul.Tensor) and dtype_of(node) == torch.float32:
        a, b = node.args
        same_shape = isinstance(a, fx.Node) and isinstance(b, fx.Node) and same(shape(a), shape(b)) and not node.kwargs
        if (
            same_shape
            and dtype_of(a) == dtype_of(b) == torch.float32
            and not {a.name, b.name} & set(exported.constants)
        ):
            op = ops.mul if node.target is aten.mul.Tensor else ops.add
            replace_node(exported, node, op, a, b, None)
