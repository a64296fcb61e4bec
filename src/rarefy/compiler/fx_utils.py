"""The exported graph, and helpers that read and change its FX nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)

MODULES = "nn_module_stack"  # key of torch's record of the modules that a node was called in

Node = Any  # fx.Node, whose arguments are of any kind


@dataclass
class ExportedGraph:
    """A graph with its constants, and how arguments and outputs are nested.

    Attributes:
        graph: the nodes. Weights are placeholders too.
        constants: tensors by the names of their placeholders.
        inputs: the placeholders of a call's tensors, in order.
        in_spec: torch's pytree spec of the arguments.
        out_spec: torch's pytree spec of the outputs.
        ranges: smallest and largest value of each open size, by its symbol.
        guards: conditions on open sizes under which the graph is right, see `shape_guards.py`.
        notes: sentences for `print(compiled)`.
        names: the model's own names of constants.
        layers: the layer of the model that each node belongs to, where it is known.
        image_sizes: rows and columns of the outputs of convolutions, which the records of nodes lose once they run.
        cache_features: features of keys and values that a KV cache keeps of each token.
        torch_nodes: operators of the engine that torch runs because it was faster.
        input_names: a name for each input, () where none are known.
        output_names: a name for each output, () where none are known.
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    inputs: list[Node]
    in_spec: Any
    out_spec: Any
    ranges: dict[str, tuple[int, int]]
    guards: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    layers: dict[Node, str] = field(default_factory=dict)
    image_sizes: dict[Node, tuple[Any, ...]] = field(default_factory=dict)
    cache_features: int = 0
    torch_nodes: set[Node] = field(default_factory=set)
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()


def shape(node: Any) -> tuple[Any, ...]:
    """Return the shape of a node's output, () where it is no tensor. Open sizes are symbols."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def same(a: Any, b: Any) -> bool:
    """Return whether two shapes are equal, whatever the open sizes will be."""
    return len(a) == len(b) and all(str(x) == str(y) for x, y in zip(a, b))


def is_node(x: Any) -> bool:
    """Return whether an argument is the output of a node, not a number or text."""
    return isinstance(x, fx.Node)


def dtype_of(node: Node) -> torch.dtype | None:
    """Return the type of a node's output, None where it is no tensor."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def replace_node(exported: ExportedGraph, node: Node, op: Callable[..., Any], *args: Any) -> Node:
    """Replace a node by a call of an operator with the same output; return it."""
    with exported.graph.inserting_before(node):
        new = exported.graph.call_function(op, args)
    new.meta["val"] = node.meta["val"]
    keep_layer(new, node)
    replace_uses(exported, node, new)
    return new


def keep_layer(new: Node, old: Node) -> Node:
    """Note that a node belongs to the module in which another one was called; return it."""
    if MODULES in old.meta:
        new.meta[MODULES] = old.meta[MODULES]
    return new


def replace_uses(exported: ExportedGraph, node: Node, new: Node) -> None:
    """Let all readers of a node read another one; erase the node."""
    node.replace_all_uses_with(new)
    exported.graph.erase_node(node)


def insert_before(exported: ExportedGraph, before: Node, op: Callable[..., Any], *args: Any) -> Node:
    """Return a new node in front of another; its shape comes from calling the operator on the arguments' records."""
    with exported.graph.inserting_before(before):
        node = exported.graph.call_function(op, args)
    node.meta["val"] = op(*fx.map_arg(args, lambda n: n.meta["val"]))
    keep_layer(node, before)
    return node


def add_constant(exported: ExportedGraph, name: str, value: Tensor) -> Node:
    """Add a constant; return its placeholder."""
    with exported.graph.inserting_before(next(iter(exported.graph.nodes))):
        node = exported.graph.placeholder(name)
    exported.constants[node.name] = node.meta["val"] = value.detach().contiguous()
    return node
