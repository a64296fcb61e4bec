"""Norms and activations that exporters write out in elementary operators, as one module each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from rarefy.common.errors import ModelError
from rarefy.onnx.graph import Graph, attribute, only, place


def gelus(graph: Graph) -> Iterable[Any]:
    """x / 2 (1 + erf(x / sqrt 2)), in whatever order, and the operator of that name."""
    users, producers = graph.users(), graph.producers()
    instead: dict[int, list[Any]] = {}
    gone: set[int] = set()
    for node in graph.nodes:
        if node.op_type == "Gelu":
            form = attribute(node, "approximate", b"none").decode()
            if form not in ("none", "tanh"):
                raise ModelError(f"{place(node)}: Gelu approximates by none or tanh, got {form!r}")
            instead[id(node)] = [graph.stand(node, nn.GELU(form))]
        elif node.op_type == "Erf":
            found = _gelu(graph, users, producers, node)
            if found is not None:
                inner, last, x = found
                gone |= {id(n) for n in inner}
                instead[id(last)] = [graph.stand(last, nn.GELU(), of=x)]
    yield from graph.replaced(instead, gone)


def _gelu(graph: Graph, users: Any, producers: Any, erf: Any) -> tuple[list[Any], Any, str] | None:
    inner = producers.get(erf.input[0])
    step = None if inner is None else _with_number(graph, inner, {"Div": math.sqrt(2), "Mul": math.sqrt(0.5)})
    plus = only(users, graph, erf.output[0], "Add")
    if inner is None or step is None or plus is None or _with_number(graph, plus, {"Add": 1.0}) is None:
        return None
    x, seen, value = step, [erf, plus], plus.output[0]
    half, full = False, False  # which of x and 1/2 it has been multiplied by
    while not (half and full):
        times = only(users, graph, value, "Mul")
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
        seen.append(times)
        value = times.output[0]
    return seen[:-1], seen[-1], x


def _with_number(graph: Graph, node: Any, numbers: dict[str, float]) -> str | None:
    """The other input of an operator, where one of them is the number that belongs to it."""
    want = numbers.get(node.op_type)
    if want is None or len(node.input) != 2:
        return None
    sides = (1,) if node.op_type in ("Div", "Pow", "Sub") else (0, 1)
    for side in sides:
        number = graph.scalar(node.input[side])
        if number is not None and math.isclose(number, want, rel_tol=1e-4):
            return node.input[1 - side]
    return None


def layer_norms(graph: Graph) -> Iterable[Any]:
    """(x - mean) / sqrt(mean((x - mean)^2) + eps) w + b over the last dimension, and the operator of that name."""
    users, producers = graph.users(), graph.producers()
    instead: dict[int, list[Any]] = {}
    gone: set[int] = set()
    for node in graph.nodes:
        if node.op_type == "LayerNormalization":
            names = [*node.input[1:3], ""][:2]
            w, b = (graph.constants.get(n) for n in names)
            if names[1] and b is None:
                continue  # it is computed
            if w is not None and w.ndim == 1 and attribute(node, "axis", -1) == -1 and len(node.output) == 1:
                eps = float(attribute(node, "epsilon", 1e-5))
                instead[id(node)] = [graph.stand(node, _norm(w, b, eps))]
        elif node.op_type == "Div":
            found = _layer_norm(graph, users, producers, node)
            if found is not None:
                inner, last, x, module = found
                gone |= {id(n) for n in inner}
                instead[id(last)] = [graph.stand(last, module, of=x)]
    yield from graph.replaced(instead, gone)


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
    away = producers.get(power.input[0])
    square = _with_number(graph, power, {"Pow": 2.0}) == power.input[0] or (
        power.op_type == "Mul" and power.input[0] == power.input[1]
    )
    if not square or away is None or away.op_type != "Sub" or div.input[0] not in away.output:
        # exporters write the difference twice at times
        return None
    first = producers.get(away.input[1])
    if first is None or not _over_last(graph, first) or first.input[0] != away.input[0]:
        return None
    times = only(users, graph, div.output[0], "Mul")
    w = None if times is None else next((graph.constants[n] for n in times.input if n in graph.constants), None)
    if times is None or w is None or w.ndim != 1:
        return None
    plus = only(users, graph, times.output[0], "Add")
    b = None if plus is None else next((graph.constants[n] for n in plus.input if n in graph.constants), None)
    last = times if plus is None or b is None or b.shape != w.shape else plus
    inner = [div, times] if last is plus else [div]
    return inner, last, away.input[0], _norm(w, b if last is plus else None, eps)


def _over_last(graph: Graph, node: Any) -> bool:
    if node.op_type != "ReduceMean" or not attribute(node, "keepdims", 1):
        return False
    axes = attribute(node, "axes", None)
    if axes is None and len(node.input) > 1:
        found = graph.constants.get(node.input[1])
        axes = None if found is None else found.reshape(-1).tolist()
    return axes is not None and list(axes) == [-1]


def _norm(w: np.ndarray, b: np.ndarray | None, eps: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(w), eps=eps, bias=b is not None)
    norm.weight.data = torch.from_numpy(w.copy())
    if b is not None:
        norm.bias.data = torch.from_numpy(b.copy())
    return norm
