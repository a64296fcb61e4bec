"""Passes that fuse norms and activations which exporters decompose into elementary operators, as one module each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from rarefy.common.errors import ModelError
from rarefy.onnx.binding import node_label
from rarefy.onnx.graph import Graph, attribute, only_user


def fuse_gelu(graph: Graph) -> Iterable[Any]:
    """Fuse x / 2 (1 + erf(x / sqrt 2)), in any order of factors, and convert the operator Gelu."""
    users, producers = graph.users(), graph.producers()
    replacements: dict[int, list[Any]] = {}
    removed: set[int] = set()
    for node in graph.nodes:
        if node.op_type == "Gelu":
            form = attribute(node, "approximate", b"none").decode()
            if form not in ("none", "tanh"):
                raise ModelError(f"{node_label(node)}: Gelu approximates by none or tanh, got {form!r}")
            replacements[id(node)] = [graph.substitute(node, nn.GELU(form))]
        elif node.op_type == "Erf":
            match = _gelu(graph, users, producers, node)
            if match is not None:
                inner, last, x = match
                removed |= {id(n) for n in inner}
                replacements[id(last)] = [graph.substitute(last, nn.GELU(), source=x)]
    yield from graph.rewritten(replacements, removed)


def _gelu(graph: Graph, users: Any, producers: Any, erf: Any) -> tuple[list[Any], Any, str] | None:
    inner = producers.get(erf.input[0])
    step = None if inner is None else _with_number(graph, inner, {"Div": math.sqrt(2), "Mul": math.sqrt(0.5)})
    plus = only_user(users, graph, erf.output[0], "Add")
    if inner is None or step is None or plus is None or _with_number(graph, plus, {"Add": 1.0}) is None:
        return None
    x, matched, value = step, [erf, plus], plus.output[0]
    half, full = False, False  # which of x and 1/2 it has been multiplied by
    while not (half and full):
        times = only_user(users, graph, value, "Mul")
        if times is None:
            return None
        other = times.input[1] if times.input[0] == value else times.input[0]
        source = producers.get(other)
        if other == x and not full:
            full = True
        elif graph.scalar(other) == 0.5 and not half:
            half = True
        elif source is not None and not (half or full) and _with_number(graph, source, {"Mul": 0.5}) == x:
            half = full = True
        else:
            return None
        matched.append(times)
        value = times.output[0]
    return matched[:-1], matched[-1], x


def _with_number(graph: Graph, node: Any, numbers: dict[str, float]) -> str | None:
    """Return the other input of an operator if one of its inputs is the expected number, else None."""
    want = numbers.get(node.op_type)
    if want is None or len(node.input) != 2:
        return None
    sides = (1,) if node.op_type in ("Div", "Pow", "Sub") else (0, 1)
    for side in sides:
        number = graph.scalar(node.input[side])
        if number is not None and math.isclose(number, want, rel_tol=1e-4):
            return node.input[1 - side]
    return None


def fuse_layer_norm(graph: Graph) -> Iterable[Any]:
    """Fuse (x - mean) / sqrt(mean((x - mean)^2) + eps) w + b over the last dimension, and convert the operator
    LayerNormalization."""
    users, producers = graph.users(), graph.producers()
    replacements: dict[int, list[Any]] = {}
    removed: set[int] = set()
    for node in graph.nodes:
        if node.op_type == "LayerNormalization":
            names = [*node.input[1:3], ""][:2]
            w, b = (graph.constants.get(n) for n in names)
            if names[1] and b is None:
                continue  # not a constant
            if w is not None and w.ndim == 1 and attribute(node, "axis", -1) == -1 and len(node.output) == 1:
                eps = float(attribute(node, "epsilon", 1e-5))
                replacements[id(node)] = [graph.substitute(node, _norm(w, b, eps))]
        elif node.op_type == "Div":
            match = _layer_norm(graph, users, producers, node)
            if match is not None:
                inner, last, x, module = match
                removed |= {id(n) for n in inner}
                replacements[id(last)] = [graph.substitute(last, module, source=x)]
    yield from graph.rewritten(replacements, removed)


def _layer_norm(graph: Graph, users: Any, producers: Any, div: Any) -> tuple[list[Any], Any, str, nn.Module] | None:
    root = producers.get(div.input[1])
    if root is None or root.op_type != "Sqrt":
        return None
    add = producers.get(root.input[0])
    if add is None or add.op_type != "Add":
        return None
    eps = next((e for n in add.input if (e := graph.scalar(n)) is not None), None)
    mean = next((m for n in add.input if (m := producers.get(n)) is not None), None)
    power = None if mean is None else producers.get(mean.input[0])
    if eps is None or mean is None or power is None or not _over_last(graph, mean):
        return None
    centered = producers.get(power.input[0])
    squared = _with_number(graph, power, {"Pow": 2.0}) == power.input[0] or (
        power.op_type == "Mul" and power.input[0] == power.input[1]
    )
    if not squared or centered is None or centered.op_type != "Sub" or div.input[0] not in centered.output:
        # some exporters compute the difference twice
        return None
    first = producers.get(centered.input[1])
    if first is None or not _over_last(graph, first) or first.input[0] != centered.input[0]:
        return None
    times = only_user(users, graph, div.output[0], "Mul")
    w = None if times is None else next((graph.constants[n] for n in times.input if n in graph.constants), None)
    if times is None or w is None or w.ndim != 1:
        return None
    plus = only_user(users, graph, times.output[0], "Add")
    b = None if plus is None else next((graph.constants[n] for n in plus.input if n in graph.constants), None)
    last = times if plus is None or b is None or b.shape != w.shape else plus
    inner = [div, times] if last is plus else [div]
    return inner, last, centered.input[0], _norm(w, b if last is plus else None, eps)


def _over_last(graph: Graph, node: Any) -> bool:
    if node.op_type != "ReduceMean" or not attribute(node, "keepdims", 1):
        return False
    axes = attribute(node, "axes", None)
    if axes is None and len(node.input) > 1:
        constant = graph.constants.get(node.input[1])
        axes = None if constant is None else constant.reshape(-1).tolist()
    return axes is not None and list(axes) == [-1]


def _norm(w: np.ndarray, b: np.ndarray | None, eps: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(w), eps=eps, bias=b is not None)
    norm.weight.data = torch.from_numpy(w.copy())
    if b is not None:
        norm.bias.data = torch.from_numpy(b.copy())
    return norm
