"""An ONNX graph that passes rewrite before it becomes torch modules: its nodes and constants, and passes on both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from rarefy.common.errors import ModelError
from rarefy.model.activation_quant import ActivationQuant
from rarefy.model.quant_grid import Grid
from rarefy.onnx.binding import evaluate, node_label
from rarefy.onnx.dtypes import stored_array, to_array, to_tensor

MAX_FOLDED, MAX_EXPANSION = 1 << 30, 16  # bytes that constants may become: any, and for each stored byte


@dataclass(frozen=True)
class Kind:
    """What is known about a value: its ONNX type, and its sizes, None where they are open (or all, if the rank is)."""

    dtype: int = 0
    dims: tuple[int | None, ...] | None = None


@dataclass
class Graph:
    """Nodes in topological order, and what is known about values.

    Attributes:
        model: the ONNX model.
        nodes: its nodes.
        constants: arrays by the name of a value.
        opset: the version of ONNX's operators.
        kinds: what is known about the types and shapes of values.
        initializers: the names of the constants that the file stores as weights.
        grids: quantization grids of dequantized constants, with as many dimensions as the array.
        quantized: how activations are quantized, by the name of the quantized value.
        modules: torch modules that compute a value, by its name; an Identity is the value's node.
    """

    model: Any
    nodes: list[Any]
    constants: dict[str, np.ndarray]
    opset: int
    kinds: dict[str, Kind] = field(default_factory=dict)
    initializers: Set[str] = frozenset()
    grids: dict[str, Grid] = field(default_factory=dict)
    quantized: dict[str, ActivationQuant] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        """Return the names of the graph's outputs."""
        return [o.name for o in self.model.graph.output]

    def users(self) -> dict[str, list[Any]]:
        """Return the nodes that read each value."""
        users: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(inputs_of(node)):
                users.setdefault(name, []).append(node)
        return users

    def producers(self) -> dict[str, Any]:
        """Return the node that computes each value."""
        return {name: node for node in self.nodes for name in node.output}

    def add_constant(self, array: np.ndarray) -> str:
        """Add a constant; return its name."""
        number = len(self.constants)
        while f"rarefy_constant_{number}" in self.constants:
            number += 1
        name = f"rarefy_constant_{number}"
        self.constants[name] = array
        return name

    def scalar(self, name: str) -> float | None:
        """Return the number of a constant with one element, None for other values."""
        array = self.constants.get(name)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 and array.ndim < 2 else None

    def substitute(self, node: Any, module: nn.Module, source: str = "", target: str = "") -> Any:
        """Return an Identity in place of `node` that `module` will replace: from the node's first input, or `source`,
        to its first output, or `target`."""
        target = target or node.output[0]
        self.modules[target] = module
        return make_node("Identity", [source or node.input[0]], [target], node)

    def rewritten(self, replacements: Mapping[int, Sequence[Any]], removed: Set[int]) -> Iterable[Any]:
        """Yield the nodes, some replaced by others and some removed, by their id."""
        for node in self.nodes:
            yield from replacements.get(id(node), [node] if id(node) not in removed else [])


def attribute(node: Any, name: str, default: Any) -> Any:
    """Return the value of a node's attribute, or the default."""
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def inputs_of(node: Any) -> list[str]:
    """Return the names of what a node reads, with what its subgraphs read from outside."""
    names = list(node.input)
    for value in node.attribute:
        if value.HasField("g"):
            inner = {o for n in value.g.node for o in n.output} | {i.name for i in value.g.initializer}
            read = [r for n in value.g.node for r in inputs_of(n)] + [o.name for o in value.g.output]
            names += [r for r in read if r not in inner]
    return names


def read_graph(model: Any, kinds: dict[str, Kind]) -> Graph:
    """Return the graph of a model, its constants collected from initializers and Constant nodes; ModelError for
    constants that are not arrays."""
    proto = model.graph
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    constants, nodes = constants_of(proto)
    stored = frozenset(i.name for i in proto.initializer)
    inputs = [i for i in proto.input if i.name not in constants]
    del proto.input[:]
    proto.input.extend(inputs)
    return Graph(model, nodes, constants, opset, kinds, stored)


def constants_of(proto: Any) -> tuple[dict[str, np.ndarray], list[Any]]:
    """Return the constants of a graph, and its other nodes."""
    if proto.sparse_initializer:
        raise ModelError("sparse initializers are not read: write the zeros out")
    constants = {i.name: stored_array(i) for i in proto.initializer}
    nodes = []
    for node in proto.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            constants[node.output[0]] = _constant(node)
        else:
            nodes.append(node)
    return constants, nodes


def _constant(node: Any) -> np.ndarray:
    if len(node.attribute) != 1:
        raise ModelError(f"Constant {node_label(node)} holds {len(node.attribute)} values")
    value = node.attribute[0]
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "value": lambda: stored_array(value.t),
        "value_float": lambda: np.array(value.f, np.float32),
        "value_int": lambda: np.array(value.i, np.int64),
        "value_floats": lambda: np.array(list(value.floats), np.float32),
        "value_ints": lambda: np.array(list(value.ints), np.int64),
    }
    if value.name not in kinds:
        raise ModelError(f"Constant {node_label(node)} holds a {value.name}: arrays and numbers are read")
    return kinds[value.name]()


def fold_constants(graph: Graph) -> Iterable[Any]:
    """Compute nodes that depend on constants alone; a transposed constant keeps its grid.

    Raises:
        ModelError: the results are far larger than the constants that the file stores.
    """
    left = MAX_FOLDED + MAX_EXPANSION * sum(a.nbytes for a in graph.constants.values())
    for node in graph.nodes:
        known = bool(node.input) and all(n in graph.constants or not n for n in node.input)
        stays = node.op_type == "DequantizeLinear" or is_lookup(node, graph.initializers, graph.constants)
        results = _computed(graph, node) if known and not stays else None
        if results is None:
            yield node
            continue
        left -= sum(r.nbytes for r in results)
        if left < 0:
            raise ModelError(
                f"{node_label(node)}: the file's constants become more than {MAX_FOLDED:,} bytes, and more than "
                f"{MAX_EXPANSION} times as many as are stored: make large constants inputs"
            )
        graph.constants.update({n: to_array(r) for n, r in zip(node.output, results) if n})
        if node.op_type in ("Transpose", "Identity") and node.input[0] in graph.grids:
            rank = results[0].dim()
            order = list(attribute(node, "perm", reversed(range(rank))))
            order = order if node.op_type == "Transpose" else list(range(rank))
            graph.grids[node.output[0]] = graph.grids[node.input[0]].map(lambda t, o=order: t.permute(o))


def is_lookup(node: Any, stored: Set[str], constants: Mapping[str, Any]) -> bool:
    """Return whether a node reads rows of a trainable table: it becomes an embedding, even for constant rows."""
    if node.op_type != "Gather" or node.input[0] not in stored or attribute(node, "axis", 0):
        return False
    table = constants[node.input[0]]
    return table.ndim == 2 and table.shape[1] > 1 and "float" in str(table.dtype)


def _computed(graph: Graph, node: Any) -> tuple[Tensor, ...] | None:
    """Return the results of a node on constants, None where they are not computed here."""
    inputs = [to_tensor(graph.constants[n]) if n else None for n in node.input]
    return evaluate(node, inputs, graph.opset)


def remove_identities(graph: Graph) -> Iterable[Any]:
    """Remove Identity nodes: their users read their input."""
    same: dict[str, str] = {}
    captured = {name for node in graph.nodes for name in inputs_of(node)[len(node.input) :]}
    for node in graph.nodes:
        for at, name in enumerate(node.input):
            node.input[at] = same.get(name, name)
        stays = node.output[0] in graph.modules or node.output[0] in graph.outputs or node.output[0] in captured
        if node.op_type == "Identity" and not stays:
            same[node.output[0]] = node.input[0]
        else:
            yield node


def remove_unused(graph: Graph) -> None:
    """Remove nodes and constants that no output depends on."""
    needed = set(graph.outputs)
    nodes: list[Any] = []
    for node in reversed(graph.nodes):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(inputs_of(node))
    graph.nodes = nodes[::-1]
    graph.constants = {n: a for n, a in graph.constants.items() if n in needed}


def only_user(users: dict[str, list[Any]], graph: Graph, value: str, kind: str) -> Any:
    """Return the one node that reads a value if it is of this operator, else None."""
    nodes = users.get(value, [])
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == kind and value not in graph.outputs else None


def make_node(
    kind: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    like: Any = None,
    same: bool = False,
    without: tuple[str, ...] = (),
    **attributes: Any,
) -> Any:
    """Return a new node.

    Args:
        kind: the operator.
        inputs: names of its inputs.
        outputs: names of its outputs.
        like: a node whose name and metadata it gets, and, if it has the same operator, its attributes.
        same: whether it gets the attributes of `like` in any case.
        without: attributes of `like` that it does not get.
        **attributes: attributes of its own.
    """
    from onnx import helper

    node = helper.make_node(kind, list(inputs), list(outputs), name="" if like is None else like.name, **attributes)
    if like is not None:
        if same or kind == like.op_type:
            node.attribute.extend(a for a in like.attribute if a.name not in (*without, *attributes))
        node.metadata_props.extend(like.metadata_props)
    return node
