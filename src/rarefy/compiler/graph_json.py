"""A compiled graph as JSON, and a graph from JSON that may be anybody's.

    {"schema": 2, "inputs": [[name, {"dtype", "sizes"} or {"value"}]], "ranges": {symbol: [least, most]},
     "in": layout, "out": layout, "notes": [text], "constants": {name: order or null},
     "kernels": {word: packed weight}, "packed": {name: form}, "nodes": [[name, op, target, args, kwargs]]}

Arguments are JSON's own where that can tell them, else an object of one key: {"node": name}, {"tuple": [..]},
{"float": "inf"}, {"slice": [..]}, {"dtype": "float32"}, {"device": "cpu"}, {"layout"}, {"memory_format"}.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.common.errors import ContainerError, ModelError
from rarefy.compiler import op_registry
from rarefy.compiler.executor import Compiled, Expected
from rarefy.compiler.export import MOST_SIZE
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.pytree_json import spec_of, tree
from rarefy.formats.sparse_encodings import DTYPES

SCHEMA = 2  # 1: operators had other names, see `op_registry.OLD_NAMES`
MOST_NODES = 50_000  # the order of calls is found in their square
CACHE = "cache"  # what a language model keeps, by the name of its placeholder
MOST_DEEP = 16  # levels of arguments in one another
MOST_INT = 1 << 63
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,499}")
SYMBOL = re.compile(r"[ -~]{1,200}")
KEYS = ("schema", "inputs", "ranges", "in", "out", "notes", "constants", "kernels", "packed", "nodes")
OTHERS: dict[str, dict[str, Any]] = {
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan},
    "dtype": {**DTYPES, "complex128": torch.complex128},
    "device": {"cpu": torch.device("cpu")},
    "layout": {"strided": torch.strided},
    "memory_format": {
        "contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format,
        "channels_last": torch.channels_last,
    },
}  # fmt: skip
KINDS = {float: "float", torch.dtype: "dtype", torch.device: "device", torch.layout: "layout"}
KINDS[torch.memory_format] = "memory_format"


@dataclass(frozen=True)
class GraphDef:
    """A graph that was read and checked, all but its tensors.

    constants  the stored tensors, and how the dimensions of one lie in memory that is not row after row
    kernels    the words that run on packed weights, and which
    packed     what each of these is, besides its tensors
    """

    graph: fx.Graph
    inputs: list[Node]
    expected: list[Any]
    in_spec: Any
    out_spec: Any
    ranges: dict[str, tuple[int, int]]
    notes: tuple[str, ...]
    constants: dict[str, list[int] | None]
    kernels: dict[Node, str]
    packed: dict[str, dict[str, Any]]


# ---- to JSON --------------------------------------------------------------------------------------------------------


def to_json(
    made: Compiled, constants: Mapping[str, Any], kernels: Mapping[Node, str], packed: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the graph of a compiled model as JSON; ModelError for what no file can tell, by its name. O(nodes)."""
    t = made.exported
    used = {*t.inputs, *(n for n in t.graph.nodes if n.op != "placeholder" or n.users)}
    told = {
        "schema": SCHEMA,
        "inputs": [[n.name, _told_input(n, e)] for n, e in zip(t.inputs, made.expected)],
        "ranges": {s: list(r) for s, r in t.ranges.items()},
        "in": tree(t.in_spec, arguments=True),
        "out": tree(t.out_spec),
        "notes": list(t.notes),
        "constants": dict(constants),
        "kernels": {n.name: name for n, name in kernels.items()},
        "packed": dict(packed),
        "nodes": [_told_node(n) for n in t.graph.nodes if n in used],
    }
    try:
        from_json(told, "the graph")
    except ContainerError as error:  # what is written can be read
        raise ModelError(f"this model runs, but cannot be saved: {error}") from error
    return told


def _told_input(node: Node, want: Any) -> dict[str, Any]:
    if isinstance(want, Expected):
        return {"dtype": _told(want.dtype, node)["dtype"], "sizes": list(want.sizes)}
    return {"value": _told(want, node)}


def _told_node(node: Node) -> list[Any]:
    if node.op == "placeholder":
        return [node.name, node.op, node.name, [], {}]
    target = "output" if node.op == "output" else op_registry.name_of(node.target)
    if target is None or node.op not in ("call_function", "output"):
        hint = ": compile the model as it was before accelerate_" if "rarefy.sparse" in str(node.target) else ""
        raise ModelError(
            f"{node.name} calls {node.target}, which no saved graph may; the model runs, but cannot be saved{hint}"
        )
    args, kwargs = [_told(a, node) for a in node.args], {n: _told(a, node) for n, a in node.kwargs.items()}
    return [node.name, node.op, target, args, kwargs]


def _told(value: Any, at: Node) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.SymInt) and str(value).isdigit():
        return int(str(value))
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, tuple | list):
        parts = [_told(v, at) for v in value]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, slice):
        return {"slice": [_told(v, at) for v in (value.start, value.stop, value.step)]}
    kind = KINDS.get(type(value), "")
    name = next((n for n, v in OTHERS.get(kind, {}).items() if v == value or (v != v and value != value)), None)
    if name is None:
        raise ModelError(f"{at.name} has the argument {str(value)[:80]}, which no file can tell; it cannot be saved")
    return {kind: name}


# ---- from JSON ------------------------------------------------------------------------------------------------------


def from_json(told: Any, where: str) -> GraphDef:
    """Return the graph that JSON tells of; ContainerError with the place for anything that no compiled model has: a
    node before what it reads, an operator not in `operators`, arguments of other kinds. O(its size)."""
    try:
        return _read(told)
    except (ValueError, RecursionError) as error:
        raise ContainerError(f"{where}: {error}") from error


def _read(told: Any) -> GraphDef:
    if type(told) is not dict or type(told.get("schema")) is not int:
        raise ValueError('must be an object with a whole number "schema"')
    if told["schema"] not in (1, SCHEMA):
        newer = "written by a newer Rarefy" if told["schema"] > SCHEMA else "of no known Rarefy"
        raise ValueError(f"schema {told['schema']} is {newer}; this one reads schemas 1 and {SCHEMA}")
    if set(told) != set(KEYS):
        raise ValueError(f"holds {_short(sorted(told))}, must be an object with {', '.join(KEYS)}")
    for name in KEYS[1:]:
        if name not in ("in", "out"):
            _of(told[name], list if name in ("inputs", "notes", "nodes") else dict, name)
    for name, on in told["kernels"].items():
        _of(on, str, f"kernels: {_short(name)}")
    expected = dict(_input(i) for i in told["inputs"])
    if len(expected) != len(told["inputs"]):
        raise ValueError("inputs: two have one name")
    graph, nodes, kernels = _graph(told, expected)
    for name, order in told["constants"].items():
        if name not in nodes or nodes[name].op != "placeholder" or name in expected:
            raise ValueError(f"constants: {_short(name)} is no placeholder of the graph")
        whole = type(order) is list and all(type(d) is int for d in order)
        if order is not None and not (whole and sorted(order) == list(range(len(order)))):
            raise ValueError(f"constants: {name}: {_short(order)} is no order of dimensions")
    inputs = [nodes[n] for n in expected if n in nodes and nodes[n].op == "placeholder"]
    if len(inputs) != len(expected):
        raise ValueError("inputs: one is no placeholder of the graph")
    leaves = len(next(n for n in nodes.values() if n.op == "output").args[0])
    return GraphDef(
        graph,
        inputs,
        list(expected.values()),
        spec_of(told["in"], len(inputs), arguments=True),
        spec_of(told["out"], leaves),
        {s: _range(s, r) for s, r in told["ranges"].items()},
        tuple(_of(n, str, "notes") for n in told["notes"]),
        told["constants"],
        kernels,
        {n: _of(p, dict, f"packed {_short(n)}") for n, p in told["packed"].items()},
    )


def _graph(told: Any, expected: dict[str, Any]) -> tuple[fx.Graph, dict[str, Node], dict[Node, str]]:
    """The graph, its nodes by name, and the words with packed weights."""
    if len(told["nodes"]) > MOST_NODES:
        raise ValueError(f"{len(told['nodes'])} nodes, at most {MOST_NODES}")
    graph, nodes, given = fx.Graph(), {}, {}
    weights: dict[Node, bool] = {}
    for i, one in enumerate(told["nodes"]):
        if type(one) is not list or len(one) != 5 or any(type(x) is not str for x in one[:3]):
            raise ValueError(f"node {i} is {_short(one)}, must be [name, op, target, args, kwargs]")
        name, op, target, args, kwargs = one
        if told["schema"] == 1:
            target = op_registry.OLD_NAMES.get(target, target)
        if not NAME.fullmatch(name) or name in nodes:
            raise ValueError(f"node {i}: {_short(name)} must be a name of its own of letters, digits and _")
        try:
            if op == "output" and i + 1 < len(told["nodes"]):
                raise ValueError("the output must be the last node")
            node = nodes[name] = _made(graph, op, target, _values(args, nodes), _of(kwargs, dict, "kwargs"), nodes)
            if op == "placeholder":
                _place(node, name, told["constants"], expected, given, weights)
            elif op == "output":
                _check_output(node, given)
            else:
                given[node] = op_registry.check_call(node.target, node.args, node.kwargs, given, weights)
                _check_weight(node, name, told, weights)
        except ValueError as error:
            raise ValueError(f"node {_short(name)}: {error}") from error
        node.name = name
    if not nodes or node.op != "output":
        raise ValueError("the last node must be the output")
    odd = next((n for n in told["kernels"] if n not in nodes or nodes[n].op != "call_function"), None)
    if odd is not None:
        raise ValueError(f"kernels: {_short(odd)} is no word of the graph")
    if set(told["packed"]) != set(told["kernels"].values()):
        raise ValueError(f"packed: {_short(sorted(told['packed']))} are not the weights that kernels run on")
    return graph, nodes, {nodes[n]: name for n, name in told["kernels"].items()}


def _made(graph: fx.Graph, op: str, target: str, args: Any, kwargs: Any, nodes: dict[str, Node]) -> Node:
    if op == "placeholder" and not args and not kwargs:
        return graph.placeholder("x")  # named by the caller
    if op == "output" and len(args) == 1 and not kwargs and isinstance(args[0], list | tuple):
        return graph.output(tuple(args[0]))
    found = op_registry.find(target) if op == "call_function" else None
    if found is None:
        raise ValueError(f"{_short(op)} of {_short(target)} is nothing that a saved graph may do")
    values = {n: _value(v, nodes, 0) for n, v in kwargs.items()}
    return graph.call_function(found, tuple(args), values)


def _place(node: Node, name: str, constants: Any, expected: Any, given: dict[Node, str], weights: Any) -> None:
    """Note what a placeholder stands for: an input, a constant, a weight that is there packed alone, or the cache."""
    if name == CACHE and name not in expected and name not in constants:
        given[node] = op_registry.CACHE
        return
    if name not in expected:
        weights[node] = name in constants
    want = expected.get(name)
    if name in constants or isinstance(want, Expected):
        given[node] = op_registry.TENSOR
    elif name in expected and type(want) in (bool, int, float):
        given[node] = op_registry.NUMBER


def _check_weight(node: Node, name: str, told: Any, weights: Mapping[Node, bool]) -> None:
    """Raise ValueError unless a word with a weight has it: packed, or as it is."""
    heavy = [op_registry.OPS[n][0] for n in ("linear", "conv2d", "embedding")]
    on = told["kernels"].get(name)
    if node.target not in heavy:
        if on is not None:
            raise ValueError("runs on a packed weight, which only products, convolutions and embeddings do")
    elif on is None and not weights[node.args[1]]:
        raise ValueError(f"its weight {node.args[1].name} is neither there as it is nor packed")
    elif on is None and node.target is heavy[0] and told["kernels"]:
        raise ValueError("has no packed weight, while others have")


def _check_output(node: Node, given: Mapping[Node, str]) -> None:
    for value in node.args[0]:
        tensor = isinstance(value, fx.Node) and given.get(value) in (op_registry.TENSOR, op_registry.NUMBER)
        if not tensor and not (value is None or type(value) in (bool, int, float, str)):
            raise ValueError(f"an output is {_short(value)}")


def _values(told: Any, nodes: dict[str, Node]) -> list[Any]:
    return [_value(v, nodes, 0) for v in _of(told, list, "args")]


def _value(told: Any, nodes: dict[str, Node], deep: int) -> Any:
    """The argument that JSON tells of."""
    if told is None or type(told) in (bool, str, float):
        return told
    if type(told) is int and -MOST_INT <= told < MOST_INT:
        return told
    if deep > MOST_DEEP:
        raise ValueError(f"arguments lie more than {MOST_DEEP} deep in one another")
    if type(told) is list:
        return [_value(v, nodes, deep + 1) for v in told]
    if type(told) is not dict or len(told) != 1:
        raise ValueError(f"{_short(told)} is no argument")
    ((kind, inner),) = told.items()
    if kind == "node" and type(inner) is str:
        if inner not in nodes:
            raise ValueError(f"reads {_short(inner)}, which is no earlier node")
        return nodes[inner]
    if kind in ("tuple", "slice") and type(inner) is list and (kind == "tuple" or len(inner) == 3):
        parts = [_value(v, nodes, deep + 1) for v in inner]
        return tuple(parts) if kind == "tuple" else slice(*parts)
    if type(inner) is not str or inner not in OTHERS.get(kind, {}):
        raise ValueError(f"{_short(told)} is no argument")
    return OTHERS[kind][inner]


def _input(told: Any) -> tuple[str, Any]:
    """Name of an input, and what is expected there."""
    if type(told) is not list or len(told) != 2 or type(told[0]) is not str or type(told[1]) is not dict:
        raise ValueError(f"input {_short(told)} must be [name, what it is]")
    name, about = told
    if set(about) == {"value"}:
        return name, _value(about["value"], {}, 0)
    dtype, sizes = about.get("dtype"), about.get("sizes")
    if set(about) != {"dtype", "sizes"} or type(dtype) is not str or dtype not in OTHERS["dtype"]:
        raise ValueError(f"input {name}: {_short(about)} is no type and sizes")
    right = type(sizes) is list and all(
        (type(s) is int and 0 <= s <= MOST_SIZE) or (type(s) is str and SYMBOL.fullmatch(s)) for s in sizes
    )
    if not right:
        raise ValueError(f"input {name}: sizes {_short(sizes)} must be numbers and names of open sizes")
    return name, Expected(OTHERS["dtype"][dtype], tuple(sizes))


def _range(symbol: str, told: Any) -> tuple[int, int]:
    right = type(told) is list and len(told) == 2 and all(type(n) is int for n in told)
    if not SYMBOL.fullmatch(symbol) or not right or not 0 <= told[0] <= told[1] <= MOST_SIZE:
        raise ValueError(f"ranges: {_short(symbol)} goes from where to where in {_short(told)}?")
    return told[0], told[1]


def _of(value: Any, kind: type, where: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{where} is {_short(value)}, must be {kind.__name__}")
    return value


def _short(value: object) -> str:
    text = "a tensor" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
