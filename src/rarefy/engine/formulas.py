"""Rules for formulas that models write out: GELU, SiLU, LayerNorm, scales of layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rarefy.compiler import ops
from rarefy.compiler.fx_utils import Node, Traced, aten, is_node, kind_of, new_constant, put, shape

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


def activations(t: Traced, node: Node) -> None:
    """x (1 + erf(x / sqrt 2)) / 2, the same with tanh, and x sigmoid(x)."""
    if node.target not in (aten.mul.Tensor, aten.div.Tensor) or kind_of(node) != torch.float32:
        return
    number, found = factors(node)
    if len(found) != 2:
        return
    for x, y in (found, found[::-1]):
        if abs(number - 1) <= CLOSE and y.target is aten.sigmoid.default and y.args[0] is x:
            put(t, node, ops.activation, x, "silu")
            return
        inner: Any = _more_than(y, 1)
        act = None if abs(number - 0.5) > CLOSE or inner is None else _gelu(inner, x)
        if act is not None:
            put(t, node, ops.activation, x, act)
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


def quick_gelu(t: Traced, node: Node) -> None:
    """x sigmoid(1.702 x) between two products: SiLU, and the number goes into both weights."""
    if node.target is not ops.times or node.args[2] is not None or len(node.users) != 1:
        return
    y = next(iter(node.users))
    for x, chance in (node.args[:2], node.args[1::-1]):
        inner = chance.args[0] if chance.target is aten.sigmoid.default and len(chance.users) == 1 else None
        if not _is(inner, QUICK, [x]) or x.target is not ops.product or set(x.users) != {inner, node}:
            continue
        if y.target is ops.product and y.args[0] is node and x.args[3:] == (None, None):
            made = _times(t, node, x.args[1:3], QUICK)
            new = put(t, node, ops.product, x.args[0], *made, None, "silu")
            w = _times(t, y, y.args[1:2], 1 / QUICK)
            put(t, y, ops.product, new, *w, *y.args[2:])
            return


def _times(t: Traced, at: Node, weights: Any, by: Any) -> list[Node | None]:
    """Weights and biases times a number, or each output by its own."""
    made: list[Node | None] = []
    for n in weights:
        w = None if n is None else t.constants[n.name]
        each = by.view(-1, *[1] * (w.dim() - 1)) if isinstance(by, Tensor) and w is not None else by
        made.append(None if w is None else new_constant(t, f"{at.name}_scaled", w * each))
    return made


def layer_scale(t: Traced, node: Node) -> None:
    """A product's outputs times a constant each: that goes into its weight and bias."""
    if node.target is not aten.mul.Tensor or kind_of(node) != torch.float32:
        return
    for y, gain in (node.args, node.args[::-1]):
        if not is_node(y) or not is_node(gain) or gain.name not in t.constants:
            continue
        by = t.constants[gain.name]
        alone = y.target is ops.product and len(y.users) == 1 and y.args[3:] == (None, None)
        if alone and by.dim() and by.numel() == by.shape[-1] == shape(y)[-1] and by.dim() <= len(shape(y)):
            put(t, node, ops.product, y.args[0], *_times(t, node, y.args[1:3], by.flatten()), None, None)
            return


def layer_norm(t: Traced, node: Node) -> None:
    """(x - mean) / sqrt(variance + least), its gain and its bias behind it."""
    if node.target not in (aten.div.Tensor, aten.mul.Tensor) or kind_of(node) != torch.float32 or node.kwargs:
        return
    for away, by in (node.args, node.args[::-1])[: 1 if node.target is aten.div.Tensor else 2]:
        root = aten.sqrt.default if node.target is aten.div.Tensor else aten.rsqrt.default
        if not is_node(by) or by.target is not root or by.args[0].target is not aten.add.Tensor:
            continue
        x, (spread, least) = _from_mean(away), by.args[0].args
        if x is not None and not is_node(least) and _variance(spread, x):
            gained(t, put(t, node, ops.norm, x, None, None, float(least), True, 1))
            return


def _from_mean(node: Any) -> Any:
    """x of x - mean(x) over features, None of anything else."""
    if not is_node(node) or node.target is not aten.sub.Tensor or node.kwargs:
        return None
    x, m = node.args
    fits = is_node(x) and is_node(m) and m.target is aten.mean.dim and m.args[0] is x
    return x if fits and not m.kwargs and over_features(m, x) else None


def over_features(node: Node, x: Node) -> bool:
    """Whether a mean is over the last dimension, which stays."""
    return list(node.args[1]) in ([-1], [len(shape(x)) - 1]) and bool((*node.args, False)[2])


def _variance(node: Any, x: Node) -> bool:
    if not is_node(node):
        return False
    if node.target in (aten.var.correction, aten.var.dim):
        how = {n: v for n, v in zip(("dim", "unbiased", "keepdim"), node.args[1:])} | node.kwargs
        whole = how.get("correction") == 0 or how.get("unbiased") is False
        last = list(how.get("dim") or ()) in ([-1], [len(shape(x)) - 1])
        return node.args[0] is x and whole and last and bool(how.get("keepdim"))
    if node.target is not aten.mean.dim or node.kwargs or not over_features(node, x):
        return False
    square = node.args[0]
    if square.target is aten.pow.Tensor_Scalar:
        return square.args[1] == 2 and _from_mean(square.args[0]) is x
    return square.target is aten.mul.Tensor and all(_from_mean(a) is x for a in square.args)


def gained(t: Traced, node: Node) -> None:
    """A constant that alone multiplies a norm is its gain, what is added then its bias."""
    for place, target in ((1, aten.mul.Tensor), (2, aten.add.Tensor)):
        user = next(iter(node.users)) if len(node.users) == 1 else None
        if user is None or user.target is not target or len(user.args) != 2 or user.kwargs:
            continue
        c = user.args[1] if user.args[0] is node else user.args[0]
        if is_node(c) and c.name in t.constants and shape(c) == tuple(shape(node)[-1:]):
            args = list(node.args)
            args[place] = c
            new = put(t, user, ops.norm, *args)
            t.graph.erase_node(node)
            node = new
