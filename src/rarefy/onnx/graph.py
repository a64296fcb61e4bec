"""An ONNX graph that passes rewrite before it becomes torch modules: its nodes and constants, and passes on both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from rarefy.common.errors import ModelError
from rarefy.model.activation_quant import ActivationQuant
from rarefy.model.quant_grid import Grid

OPSET = 17  # newer graphs are rewritten to this version of the operators
SHAPE_OPS = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity", "Flatten")
ARITHMETIC_OPS = ("Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal")
REDUCE_OPS = ("Max", "Mean", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
MAX_FOLDED = 1 << 28  # elements of a folded constant


@dataclass
class Graph:
    """Nodes in topological order, and what is known about values.

    Attributes:
        model: the ONNX model.
        nodes: its nodes.
        constants: arrays by the name of a value.
        opset: the version of ONNX's operators.
        grids: quantization grids of dequantized constants, with as many dimensions as the array.
        quantized: how activations are quantized, by the name of the quantized value.
        modules: torch modules that compute a value, by its name; an Identity is the value's node.
    """

    model: Any
    nodes: list[Any]
    constants: dict[str, np.ndarray]
    opset: int
    grids: dict[str, Grid] = field(default_factory=dict)
    quantized: dict[str, ActivationQuant] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        """The names of the graph's outputs."""
        return [o.name for o in self.model.graph.output]

    def users(self) -> dict[str, list[Any]]:
        """Return the nodes that read each value."""
        users: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
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


def node_label(node: Any) -> str:
    """Return the name of a node for messages."""
    return node.name or node.output[0]


def attribute(node: Any, name: str, default: Any) -> Any:
    """Return the value of a node's attribute, or the default."""
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def read_graph(model: Any) -> Graph:
    """Return the graph of a model, its constants collected from initializers and Constant nodes; ModelError for
    constants that are not arrays."""
    from onnx import numpy_helper

    proto = model.graph
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if proto.sparse_initializer:
        raise ModelError("sparse initializers are not read: write the zeros out")
    try:
        constants = {i.name: numpy_helper.to_array(i) for i in proto.initializer}
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"a constant is not an array of numbers: {error}") from None
    nodes = []
    for node in proto.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            constants[node.output[0]] = _constant(node)
        else:
            nodes.append(node)
    inputs = [i for i in proto.input if i.name not in constants]
    del proto.input[:]
    proto.input.extend(inputs)
    return Graph(model, nodes, constants, opset)


def _constant(node: Any) -> np.ndarray:
    from onnx import numpy_helper

    if len(node.attribute) != 1:
        raise ModelError(f"Constant {node_label(node)} holds {len(node.attribute)} values")
    value = node.attribute[0]
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "value": lambda: numpy_helper.to_array(value.t),
        "value_float": lambda: np.array(value.f, np.float32),
        "value_int": lambda: np.array(value.i, np.int64),
        "value_floats": lambda: np.array(list(value.floats), np.float32),
        "value_ints": lambda: np.array(list(value.ints), np.int64),
    }
    if value.name not in kinds:
        raise ModelError(f"Constant {node_label(node)} holds a {value.name}: arrays and numbers are read")
    return kinds[value.name]()


def fold_constants(graph: Graph) -> Iterable[Any]:
    """Compute nodes that depend on constants alone; a transposed constant keeps its grid."""
    for node in graph.nodes:
        known = bool(node.input) and all(n in graph.constants or not n for n in node.input)
        if known and node.op_type in (*SHAPE_OPS, *ARITHMETIC_OPS, "QuantizeLinear") and _small(graph, node):
            result = _computed(graph, node)
            if result is None:
                yield node
                continue
            graph.constants[node.output[0]] = result
            if node.op_type in ("Transpose", "Identity") and node.input[0] in graph.grids:
                order = list(attribute(node, "perm", reversed(range(result.ndim))))
                order = order if node.op_type == "Transpose" else list(range(result.ndim))
                graph.grids[node.output[0]] = graph.grids[node.input[0]].map(lambda t, o=order: t.permute(o))
        else:
            yield node


def _small(graph: Graph, node: Any) -> bool:
    """Whether the result is small enough to keep."""
    shapes = [graph.constants[n].shape for n in node.input if n]
    if node.op_type not in ARITHMETIC_OPS:
        return True
    try:
        return math.prod(np.broadcast_shapes(*shapes)) <= MAX_FOLDED
    except ValueError:
        return False


def _computed(graph: Graph, node: Any) -> np.ndarray | None:
    """The result of a node on constants, None where ONNX's reference evaluator cannot compute it."""
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    inputs = {n: graph.constants[n] for n in node.input if n}
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in inputs.items()
    ]
    try:
        out = helper.make_tensor_value_info(node.output[0], 0, None)
        model = helper.make_model(
            helper.make_graph([node], "one", values, [out]), opset_imports=[helper.make_opsetid("", graph.opset)]
        )
        return np.asarray(next(iter(ReferenceEvaluator(model).run(None, inputs))))
    except Exception:  # the node stays, and is converted or refused later
        return None


def to_opset_17(graph: Graph) -> Iterable[Any]:
    """Rewrite newer operators as those of version 17, where that is possible; others are refused later."""
    from onnx import helper

    if graph.opset <= OPSET:
        yield from graph.nodes
        return
    plain = {"AveragePool": ("dilations", None), "Cast": ("saturate", 1), "Resize": ("antialias", 0)}
    for node in graph.nodes:
        kind = node.op_type.removeprefix("Reduce")
        if node.op_type.startswith("Reduce") and kind in REDUCE_OPS:
            axes = graph.constants.get(node.input[1]) if len(node.input) > 1 and node.input[1] else None
            if len(node.input) > 1 and node.input[1] and axes is None:
                raise ModelError(f"{node_label(node)}: the axes of a {node.op_type} are constants")
            none = axes is None or not axes.size
            if none and attribute(node, "noop_with_empty_axes", 0):
                yield make_node("Identity", node.input[:1], node.output)
                continue
            reduce = make_node(node.op_type, node.input[:1], node.output, node, without=("noop_with_empty_axes",))
            if axes is not None and axes.size:
                reduce.attribute.append(helper.make_attribute("axes", axes.reshape(-1).tolist()))
            yield reduce
        elif node.op_type == "Split":
            yield make_node("Split", node.input, node.output, node, without=("num_outputs",))
        elif node.op_type == "Reshape" and not (graph.constants.get(node.input[1], np.ones(1)) == 0).any():
            yield make_node("Reshape", node.input, node.output, node, without=("allowzero",))
        elif node.op_type in plain:
            name, default = plain[node.op_type]
            value = attribute(node, name, default)
            same = value == default or (default is None and set(value) == {1})
            yield make_node(node.op_type, node.input, node.output, node, without=(name,) if same else ())
        else:
            yield node


def remove_identities(graph: Graph) -> Iterable[Any]:
    """Remove Identity nodes: their users read their input."""
    same: dict[str, str] = {}
    for node in graph.nodes:
        for at, name in enumerate(node.input):
            node.input[at] = same.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in graph.modules and node.output[0] not in graph.outputs:
            same[node.output[0]] = node.input[0]
        else:
            yield node


def separate_outputs(graph: Graph) -> Iterable[Any]:
    """Give every output of the graph a node of its own."""
    producers, known = graph.producers(), set[str]()
    renamed: dict[str, str] = {}
    for name in graph.outputs:
        producer = producers.get(name)
        single = producer is not None and len([o for o in producer.output if o]) == 1
        if not single or name in known:
            renamed[name] = f"{name}_rarefy_out"
        known.add(name)
    yield from graph.nodes
    for output in graph.model.graph.output:
        if output.name in renamed:
            yield make_node("Identity", [output.name], [renamed[output.name]])
            output.name = renamed[output.name]


def remove_unused(graph: Graph) -> None:
    """Remove nodes and constants that no output depends on."""
    needed = set(graph.outputs)
    nodes: list[Any] = []
    for node in reversed(graph.nodes):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
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
