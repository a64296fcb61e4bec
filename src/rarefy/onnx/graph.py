"""An ONNX graph as it is rewritten before it becomes torch modules: its nodes, its constants, and what both come to."""

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

OPSET = 17  # what newer graphs are brought to
SHAPES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity", "Flatten")
NUMBERS = ("Add", "Sub", "Mul", "Div", "Neg", "Sqrt", "Reciprocal")
REDUCED = ("Max", "Mean", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
MOST_FOLDED = 1 << 28  # elements of a constant that others come to


@dataclass
class Graph:
    """Nodes in order, and what is known about values.

    constants  value -> its array
    grids      of constants that were codes: bits, scale and zero point in as many dimensions as the array
    rounded    values of activations that lie on the points that codes can mean, and which
    stands     value -> the torch module that makes it; the node that did is an Identity
    """

    model: Any
    nodes: list[Any]
    constants: dict[str, np.ndarray]
    opset: int
    grids: dict[str, Grid] = field(default_factory=dict)
    rounded: dict[str, ActivationQuant] = field(default_factory=dict)
    stands: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def outputs(self) -> list[str]:
        return [o.name for o in self.model.graph.output]

    def users(self) -> dict[str, list[Any]]:
        """value -> the nodes that read it."""
        found: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                found.setdefault(name, []).append(node)
        return found

    def producers(self) -> dict[str, Any]:
        return {name: node for node in self.nodes for name in node.output}

    def new(self, array: np.ndarray) -> str:
        """Give a constant a name."""
        number = len(self.constants)
        while f"rarefy_constant_{number}" in self.constants:
            number += 1
        name = f"rarefy_constant_{number}"
        self.constants[name] = array
        return name

    def scalar(self, name: str) -> float | None:
        """The number that a value always is, if it is one."""
        array = self.constants.get(name)
        return float(array.reshape(-1)[0]) if array is not None and array.size == 1 and array.ndim < 2 else None

    def stand(self, node: Any, module: nn.Module, of: str = "", to: str = "") -> Any:
        """An Identity for which `module` will stand in the place of `node`: from its first input, or `of`, to its first
        output, or `to`."""
        to = to or node.output[0]
        self.stands[to] = module
        return make("Identity", [of or node.input[0]], [to], node)

    def replaced(self, instead: Mapping[int, Sequence[Any]], gone: Set[int]) -> Iterable[Any]:
        """The nodes with others in the place of some, by their id, and without those that are gone."""
        for node in self.nodes:
            yield from instead.get(id(node), [node] if id(node) not in gone else [])


def place(node: Any) -> str:
    """What to call a node in a message."""
    return node.name or node.output[0]


def attribute(node: Any, name: str, default: Any) -> Any:
    """Return what a node says of an attribute."""
    from onnx import helper

    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def graph_of(model: Any) -> Graph:
    """Return the graph of a model with its constants taken out of initializers and Constant nodes; ModelError for
    constants that are no arrays."""
    from onnx import numpy_helper

    proto = model.graph
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if proto.sparse_initializer:
        raise ModelError("sparse initializers are not read: write the zeros out")
    try:
        constants = {i.name: numpy_helper.to_array(i) for i in proto.initializer}
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"a constant that is no array of numbers: {error}") from None
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
        raise ModelError(f"Constant {place(node)} holds {len(node.attribute)} values")
    value = node.attribute[0]
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "value": lambda: numpy_helper.to_array(value.t),
        "value_float": lambda: np.array(value.f, np.float32),
        "value_int": lambda: np.array(value.i, np.int64),
        "value_floats": lambda: np.array(list(value.floats), np.float32),
        "value_ints": lambda: np.array(list(value.ints), np.int64),
    }
    if value.name not in kinds:
        raise ModelError(f"Constant {place(node)} holds a {value.name}: arrays and numbers are read")
    return kinds[value.name]()


def fold(graph: Graph) -> Iterable[Any]:
    """Compute what depends on constants alone; transposed, a constant keeps its grid."""
    for node in graph.nodes:
        known = bool(node.input) and all(n in graph.constants or not n for n in node.input)
        if known and node.op_type in (*SHAPES, *NUMBERS, "QuantizeLinear") and _small(graph, node):
            made = _computed(graph, node)
            if made is None:
                yield node
                continue
            graph.constants[node.output[0]] = made
            if node.op_type in ("Transpose", "Identity") and node.input[0] in graph.grids:
                order = list(attribute(node, "perm", reversed(range(made.ndim))))
                order = order if node.op_type == "Transpose" else list(range(made.ndim))
                graph.grids[node.output[0]] = graph.grids[node.input[0]].map(lambda t, o=order: t.permute(o))
        else:
            yield node


def _small(graph: Graph, node: Any) -> bool:
    """Whether what comes out is no larger than one may keep."""
    shapes = [graph.constants[n].shape for n in node.input if n]
    if node.op_type not in NUMBERS:
        return True
    try:
        return math.prod(np.broadcast_shapes(*shapes)) <= MOST_FOLDED
    except ValueError:
        return False


def _computed(graph: Graph, node: Any) -> np.ndarray | None:
    from onnx import helper
    from onnx.reference import ReferenceEvaluator

    given = {n: graph.constants[n] for n in node.input if n}
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in given.items()
    ]
    try:
        out = helper.make_tensor_value_info(node.output[0], 0, None)
        made = helper.make_model(
            helper.make_graph([node], "one", values, [out]), opset_imports=[helper.make_opsetid("", graph.opset)]
        )
        return np.asarray(next(iter(ReferenceEvaluator(made).run(None, given))))
    except Exception:  # whatever it cannot compute stays a node, which is read or refused by its name
        return None


def lower(graph: Graph) -> Iterable[Any]:
    """Operators as they were written in version 17, where they can be: what else is new in them is refused later."""
    from onnx import helper

    if graph.opset <= OPSET:
        yield from graph.nodes
        return
    plain = {"AveragePool": ("dilations", None), "Cast": ("saturate", 1), "Resize": ("antialias", 0)}
    for node in graph.nodes:
        kind = node.op_type.removeprefix("Reduce")
        if node.op_type.startswith("Reduce") and kind in REDUCED:
            axes = graph.constants.get(node.input[1]) if len(node.input) > 1 and node.input[1] else None
            if len(node.input) > 1 and node.input[1] and axes is None:
                raise ModelError(f"{place(node)}: the axes of a {node.op_type} are constants")
            none = axes is None or not axes.size
            if none and attribute(node, "noop_with_empty_axes", 0):
                yield make("Identity", node.input[:1], node.output)
                continue
            made = make(node.op_type, node.input[:1], node.output, node, without=("noop_with_empty_axes",))
            if axes is not None and axes.size:
                made.attribute.append(helper.make_attribute("axes", axes.reshape(-1).tolist()))
            yield made
        elif node.op_type == "Split":
            yield make("Split", node.input, node.output, node, without=("num_outputs",))
        elif node.op_type == "Reshape" and not (graph.constants.get(node.input[1], np.ones(1)) == 0).any():
            yield make("Reshape", node.input, node.output, node, without=("allowzero",))
        elif node.op_type in plain:
            name, usual = plain[node.op_type]
            value = attribute(node, name, usual)
            same = value == usual or (usual is None and set(value) == {1})
            yield make(node.op_type, node.input, node.output, node, without=(name,) if same else ())
        else:
            yield node


def identities(graph: Graph) -> Iterable[Any]:
    """What reads an Identity reads what it reads."""
    same: dict[str, str] = {}
    for node in graph.nodes:
        for at, name in enumerate(node.input):
            node.input[at] = same.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in graph.stands and node.output[0] not in graph.outputs:
            same[node.output[0]] = node.input[0]
        else:
            yield node


def end(graph: Graph) -> Iterable[Any]:
    """Every output of the graph comes from a node of its own."""
    producers, seen = graph.producers(), set[str]()
    renamed: dict[str, str] = {}
    for name in graph.outputs:
        maker = producers.get(name)
        alone = maker is not None and len([o for o in maker.output if o]) == 1
        if not alone or name in seen:
            renamed[name] = f"{name}_rarefy_out"
        seen.add(name)
    yield from graph.nodes
    for output in graph.model.graph.output:
        if output.name in renamed:
            yield make("Identity", [output.name], [renamed[output.name]])
            output.name = renamed[output.name]


def prune(graph: Graph) -> None:
    """Leave out what nothing reads."""
    wanted = set(graph.outputs)
    kept: list[Any] = []
    for node in reversed(graph.nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted |= set(node.input)
    graph.nodes = kept[::-1]
    graph.constants = {n: a for n, a in graph.constants.items() if n in wanted}


def only(users: dict[str, list[Any]], graph: Graph, value: str, kind: str) -> Any:
    """The one node that reads a value, if it is of a kind."""
    found = users.get(value, [])
    return found[0] if len(found) == 1 and found[0].op_type == kind and value not in graph.outputs else None


def make(
    kind: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    like: Any = None,
    same: bool = False,
    without: tuple[str, ...] = (),
    **attributes: Any,
) -> Any:
    """A node; with the name, the notes and the attributes of another."""
    from onnx import helper

    made = helper.make_node(kind, list(inputs), list(outputs), name="" if like is None else like.name, **attributes)
    if like is not None:
        if same or kind == like.op_type:
            made.attribute.extend(a for a in like.attribute if a.name not in (*without, *attributes))
        made.metadata_props.extend(like.metadata_props)
    return made
