"""Dynamo's graphs: which inputs are weights, what keeps a graph in eager torch, and a copy that holds its weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy.compiler.half_precision import PRECISION_OF
from rarefy.runtime import bindings

GRAD_MODE = torch._C._set_grad_enabled
STATIC = "_dynamo_static_input_type"  # Dynamo's mark of parameters and buffers
MODES = ("autocast", "inference_mode", "functorch", "vmap", "saved_tensors_hooks")  # in names of functions
GRADIENTS = "gradients are computed: call it under torch.no_grad() or torch.inference_mode()"


@dataclass(frozen=True)
class GraphInputs:
    """The positions of a graph's inputs.

    Attributes:
        weights: parameters and buffers.
        tensors: all other tensors.
        sizes: for each size that Dynamo keeps open, the position of a tensor and the dimension with that size.
        dynamic: whether sizes of tensors differ from call to call.
    """

    weights: tuple[int, ...]
    tensors: tuple[int, ...]
    sizes: dict[int, tuple[int, int]]
    dynamic: bool


def placeholders(graph: fx.GraphModule) -> list[Any]:
    """Return the nodes of a graph's inputs."""
    return [n for n in graph.graph.nodes if n.op == "placeholder"]


def _example(node: Any) -> Any:
    return node.meta.get("example_value")


def _is_weight(node: Any) -> bool:
    static = STATIC in node.meta.get("tensor_dict", {})
    return static or isinstance(_example(node), nn.Parameter)


def inputs_of(graph: fx.GraphModule) -> GraphInputs:
    """Return the positions of weights, other tensors and open sizes among a graph's inputs."""
    nodes = placeholders(graph)
    weights = tuple(i for i, n in enumerate(nodes) if _is_weight(n))
    tensors = tuple(i for i, n in enumerate(nodes) if i not in weights and isinstance(_example(n), Tensor))
    places: dict[str, tuple[int, int]] = {}
    for i in tensors:
        for d, size in enumerate(_example(nodes[i]).shape):
            if isinstance(size, torch.SymInt):
                places.setdefault(str(size), (i, d))
    symbols = {i: str(_example(n)) for i, n in enumerate(nodes) if isinstance(_example(n), torch.SymInt)}
    sizes = {i: places[symbol] for i, symbol in symbols.items() if symbol in places}
    return GraphInputs(weights, tensors, sizes, bool(places))


def reason_for_eager(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> str | None:
    """Return why a graph must run in eager torch, None where the engine may run it.

    Args:
        graph: Dynamo's graph.
        example_inputs: the tensors and sizes of the call that Dynamo traced.
    """
    missing = bindings.missing()
    if missing is not None:
        return f"there are no kernels: {missing}"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    tensors = [t for t in example_inputs if isinstance(t, Tensor)]
    return _wrong_tensor(tensors) or _wrong_input(graph) or _wrong_node(graph, tensors)


def _wrong_tensor(tensors: Sequence[Tensor]) -> str | None:
    for t in tensors:
        if t.device.type != "cpu":
            return f"an input is on another device than the CPU: {t.device}"
        if t.layout != torch.strided or type(t) not in (Tensor, nn.Parameter):
            return f"an input is no plain tensor: {type(t).__name__}, {t.layout}"
        if t.is_complex() or (t.is_floating_point() and t.dtype not in PRECISION_OF):
            return f"the engine has no {str(t.dtype).removeprefix('torch.')}"
    return None


def _wrong_input(graph: fx.GraphModule) -> str | None:
    inputs, nodes = inputs_of(graph), placeholders(graph)
    known = {*inputs.weights, *inputs.tensors, *inputs.sizes}
    other = next((n for i, n in enumerate(nodes) if i not in known), None)
    if other is not None:
        return f"the input {other.name} is no tensor and no size of one, and changes from call to call"
    if any(n.op in ("call_module", "get_attr") for n in graph.graph.nodes):
        return "its modules are not inlined: set torch._dynamo.config.inline_inbuilt_nn_modules to True"
    weights = [_example(nodes[i]) for i in inputs.weights]
    if not any(t.dim() > 1 and t.is_floating_point() for t in weights):
        return "it has no layer with weights"
    return None if inputs.tensors else "it has no input"


def _wrong_node(graph: fx.GraphModule, tensors: Sequence[Tensor]) -> str | None:
    enabled = before = torch.is_grad_enabled()
    gradients = any(t.requires_grad for t in tensors)
    for n in graph.graph.nodes:
        if n.op == "call_function" and n.target is GRAD_MODE:
            enabled = bool(n.args[0])
        elif n.op.startswith("call_"):
            if n.op == "call_method" and n.target in ("requires_grad_", "backward"):
                return GRADIENTS
            if gradients and enabled:
                return GRADIENTS
            name = f"{getattr(n.target, '__module__', '')}.{getattr(n.target, '__name__', n.target)}"
            mode = next((m for m in MODES if m in name), None)
            if mode is not None:
                return f"it turns {mode} on or off"
            if isinstance(n.target, torch._ops.HigherOrderOperator):
                return f"it calls {n.target.name()}"
    return None if enabled == before else "it changes whether gradients are computed"


def place_of(graph: fx.GraphModule) -> str:
    """Return a text that names a graph: Dynamo's number of it, and its first line of the user's code."""
    number = graph.meta.get("dynamo_compile_id") if hasattr(graph, "meta") else None
    text = "graph" if number is None else f"graph {number}"
    for n in graph.graph.nodes:
        lines = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', n.stack_trace or "")
        if lines:
            file, line, function = next((place for place in lines if place[2] == "forward"), lines[0])
            return f"{text} ({Path(file).name}, line {line}, in {function})"
    return text


def freeze(graph: fx.GraphModule, inputs: GraphInputs, weights: Sequence[Tensor]) -> fx.GraphModule:
    """Return a graph as a module that holds its weights, and takes the other tensors alone.

    Args:
        graph: Dynamo's graph.
        inputs: the positions of its inputs.
        weights: the tensors at `inputs.weights`. They are shared, not copied.
    """
    nodes = placeholders(graph)
    new = fx.Graph()
    copies: dict[Any, Any] = {nodes[i]: new.placeholder(_plain_name(nodes[i].name)) for i in inputs.tensors}
    attributes: dict[str, Any] = {}
    for i, weight in zip(inputs.weights, weights):
        attributes[f"weight_{i}"] = weight
        copies[nodes[i]] = new.get_attr(f"weight_{i}")
    for i, (position, dim) in inputs.sizes.items():
        copies[nodes[i]] = new.call_method("size", (copies[nodes[position]], dim))
    for n in graph.graph.nodes:
        if n.op == "output":
            new.output(fx.map_arg(n.args[0], copies.__getitem__))
        elif n.op != "placeholder" and n.target is not GRAD_MODE:  # gradients are off for all of it
            copies[n] = new.node_copy(n, copies.__getitem__)
            copies[n].meta = {}
    return fx.GraphModule(attributes, new).eval()


def _plain_name(name: str) -> str:
    return name.lower().removeprefix("l_").strip("_") or "input"
