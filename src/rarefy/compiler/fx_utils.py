"""The exported graph and small helpers that read and change its FX nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten


Node = Any  # fx.Node, whose arguments are of any kind


@dataclass
class ExportedGraph:
    """A graph, its constants by the names of their placeholders, and how arguments and outputs are laid out.

    inputs  the placeholders of the call's tensors, in their order
    ranges  from where to where a size that is open may go, by its symbol
    names   of constants that are the model's own, as it calls them
    kept    features of keys and values that a cache keeps of a token
    """

    graph: fx.Graph
    constants: dict[str, Tensor]
    inputs: list[Node]
    in_spec: Any
    out_spec: Any
    ranges: dict[str, tuple[int, int]]
    notes: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    kept: int = 0


def shape(node: Any) -> tuple[Any, ...]:
    """Return the sizes of a node's output, () where it is no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def same(a: Any, b: Any) -> bool:
    """Whether sizes agree, whatever the open ones will be."""
    return len(a) == len(b) and all(str(x) == str(y) for x, y in zip(a, b))


def is_node(x: Any) -> bool:
    """Return whether an argument is what a node gives, not a number or text."""
    return isinstance(x, fx.Node)


def kind_of(node: Node) -> torch.dtype | None:
    """Return the type of a node's output, None where it is no tensor."""
    value = node.meta.get("val")
    return value.dtype if isinstance(value, Tensor) else None


def replace_node(t: ExportedGraph, node: Node, word: Callable[..., Any], *args: Any) -> Node:
    """Have a word in the place of a node; return it."""
    with t.graph.inserting_before(node):
        new = t.graph.call_function(word, args)
    new.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(new)
    t.graph.erase_node(node)
    return new


def insert_before(t: ExportedGraph, before: Node, target: Callable[..., Any], *args: Any) -> Node:
    """Return a new node in front of another."""
    with t.graph.inserting_before(before):
        node = t.graph.call_function(target, args)
    node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return node


def add_constant(t: ExportedGraph, name: str, value: Tensor) -> Node:
    """Add a constant; return its node."""
    with t.graph.inserting_before(next(iter(t.graph.nodes))):
        node = t.graph.placeholder(name)
    t.constants[node.name] = node.meta["val"] = value.detach().contiguous()
    return node


VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
