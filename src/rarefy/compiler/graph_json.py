"""A compiled graph as JSON, and back: what is read is checked, as the file may come from anybody.

    {"schema": 5, "inputs": [[name, {"dtype", "sizes"} or {"value"}]], "ranges": {symbol: [smallest, largest]},
     "guards": [condition on sizes, see `shape_guards.py`],
     "in": nesting, "out": nesting, "notes": [text], "constants": {name: order of dimensions or null},
     "kernels": {node: packed weight}, "packed": {name: fields}, "torch": [node that torch runs faster],
     "grids": {node: [scale, zero] of its input's 8-bit codes, and then perhaps of its residual's},
     "names": {"inputs": [name of each input], "outputs": [name of each output]}, both [] where none are known,
     "nodes": [[name, op, target, args, kwargs]]}

Arguments are JSON's own values where it has them, else an object with one key: {"node": name}, {"tuple": [..]},
{"float": "inf"}, {"slice": [..]}, {"dtype": "float32"}, {"device": "cpu"}, {"layout"}, {"memory_format"}.
Schema 4 has no "guards"; schema 3 no "names" either; schema 2 no "torch" and "grids" either; schema 1 has other names
of operators too, see `old_op_names.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from rarefy.common.errors import ContainerError, ModelError
from rarefy.compiler import op_registry
from rarefy.compiler.checked_ops import CHECKED
from rarefy.compiler.executor import Compiled
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.input_checks import InputSpec
from rarefy.compiler.old_op_names import OLD_OP_NAMES
from rarefy.compiler.operators.linear import linear
from rarefy.compiler.operators.table import BY_TARGET
from rarefy.compiler.pytree_json import from_nesting, to_nesting
from rarefy.compiler.shape_guards import MAX_SIZE, parse
from rarefy.formats.sparse_encodings import DTYPES
from rarefy.model.activation_quant import MIN_SCALE, ActivationQuant

SCHEMA, READABLE = 5, (1, 2, 3, 4, 5)
MAX_GUARDS = 10_000
MAX_NODES = 50_000  # scheduling takes time in the square of them
CACHE = "cache"  # name of the placeholder of a language model's KV cache
MAX_DEPTH = 16  # levels of nested arguments
MAX_INT = 1 << 63
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,499}")
SYMBOL = re.compile(r"[ -~]{1,200}")
KEYS = (
    "schema", "inputs", "ranges", "in", "out", "notes", "constants", "kernels", "packed", "torch", "grids", "names",
    "guards", "nodes",
)  # fmt: skip
ADDED_IN = {"torch": 3, "grids": 3, "names": 4, "guards": 5}  # the first schema with these keys
MAX_NAME = 10_000  # characters of the name of an input or output
NAMED_VALUES: dict[str, dict[str, Any]] = {
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
    """A graph that was read and checked, without its tensors.

    Attributes:
        graph: the nodes.
        inputs: the placeholders of a call's tensors, in order.
        input_specs: what each of them must be.
        in_spec: torch's pytree spec of the arguments.
        out_spec: torch's pytree spec of the outputs.
        ranges: smallest and largest value of each open size.
        guards: conditions on open sizes.
        notes: sentences for `print(compiled)`.
        constants: names of stored tensors, and the order of dimensions in memory of one that is not contiguous.
        kernels: the nodes with packed weights, and the names of these.
        packed: the fields of each packed weight that are not tensors.
        torch_nodes: the engine's operators that torch runs faster.
        grids: the static 8-bit grids of inputs, and of residuals, by the operators that read them.
        input_names: a name for each input, () where none are known.
        output_names: a name for each output, () where none are known.
    """

    graph: fx.Graph
    inputs: list[Node]
    input_specs: list[Any]
    in_spec: Any
    out_spec: Any
    ranges: dict[str, tuple[int, int]]
    guards: tuple[str, ...]
    notes: tuple[str, ...]
    constants: dict[str, list[int] | None]
    kernels: dict[Node, str]
    packed: dict[str, dict[str, Any]]
    torch_nodes: set[Node]
    grids: dict[Node, tuple[ActivationQuant, ActivationQuant | None]]
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]


# ---- to JSON --------------------------------------------------------------------------------------------------------


def to_json(
    compiled: Compiled, constants: Mapping[str, Any], kernels: Mapping[Node, str], packed: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the graph of a compiled model as JSON. O(nodes).

    Args:
        compiled: the model.
        constants: as `GraphDef.constants`.
        kernels: as `GraphDef.kernels`.
        packed: as `GraphDef.packed`.

    Raises:
        ModelError: if the graph has an operator, an argument or an output that cannot be saved.
    """
    e = compiled.exported
    used = {*e.inputs, *(n for n in e.graph.nodes if n.op != "placeholder" or n.users)}
    value = {
        "schema": SCHEMA,
        "inputs": [[n.name, _input_to_json(n, spec)] for n, spec in zip(e.inputs, compiled.input_specs)],
        "ranges": {s: list(r) for s, r in e.ranges.items()},
        "guards": list(e.guards),
        "in": to_nesting(e.in_spec, arguments=True),
        "out": to_nesting(e.out_spec),
        "notes": list(e.notes),
        "constants": dict(constants),
        "kernels": {n.name: name for n, name in kernels.items()},
        "packed": dict(packed),
        "torch": [n.name for n in e.graph.nodes if n in e.torch_nodes],
        "grids": {n.name: _numbers(k) for n, k in compiled.kernels.items() if k.input_grid is not None},
        "names": {"inputs": list(e.input_names), "outputs": list(e.output_names)},
        "nodes": [_node_to_json(n) for n in e.graph.nodes if n in used],
    }
    try:
        from_json(value, "the graph")
    except ContainerError as error:  # what is written can be read
        raise ModelError(f"this model runs, but cannot be saved: {error}") from error
    return value


def _input_to_json(node: Node, spec: Any) -> dict[str, Any]:
    if isinstance(spec, InputSpec):
        return {"dtype": _to_json(spec.dtype, node)["dtype"], "sizes": list(spec.sizes)}
    return {"value": _to_json(spec, node)}


def _node_to_json(node: Node) -> list[Any]:
    if node.op == "placeholder":
        return [node.name, node.op, node.name, [], {}]
    target = "output" if node.op == "output" else op_registry.name_of(node.target)
    if target is None or node.op not in ("call_function", "output"):
        hint = ": compile the model as it was before accelerate_" if "rarefy.sparse" in str(node.target) else ""
        raise ModelError(
            f"this model runs, but cannot be saved: {node.name} calls {node.target}, which saved graphs may not call"
            f"{hint}"
        )
    args, kwargs = [_to_json(a, node) for a in node.args], {n: _to_json(a, node) for n, a in node.kwargs.items()}
    return [node.name, node.op, target, args, kwargs]


def _to_json(value: Any, node: Node) -> Any:
    """Return an argument of a node as JSON."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.SymInt) and str(value).isdigit():
        return int(str(value))
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    if isinstance(value, tuple | list):
        parts = [_to_json(v, node) for v in value]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, slice):
        return {"slice": [_to_json(v, node) for v in (value.start, value.stop, value.step)]}
    kind = KINDS.get(type(value), "")
    names = NAMED_VALUES.get(kind, {}).items()
    name = next((n for n, v in names if v == value or (v != v and value != value)), None)  # NaN is not equal to itself
    if name is None:
        raise ModelError(
            f"this model runs, but cannot be saved: {node.name} has the argument {str(value)[:80]}, for which there is "
            "no JSON"
        )
    return {kind: name}


# ---- from JSON ------------------------------------------------------------------------------------------------------


def from_json(value: Any, where: str) -> GraphDef:
    """Return the graph that JSON describes. O(its size).

    Raises:
        ContainerError: with `where` and the place in it, if anything is not as `to_json` writes it, such as a node that
            reads a later one, an operator that is not in `op_registry`, or an argument of another kind.
    """
    try:
        return _graph_def(value)
    except (ValueError, RecursionError) as error:
        raise ContainerError(f"{where}: {error}") from error


def _graph_def(value: Any) -> GraphDef:
    _check_keys(value)
    specs = dict(_input_from_json(i) for i in value["inputs"])
    if len(specs) != len(value["inputs"]):
        raise ValueError("inputs: a name occurs twice")
    reader = _Reader(value, specs)
    nodes = reader.nodes
    for name, order in value["constants"].items():
        if name not in nodes or nodes[name].op != "placeholder" or name in specs:
            raise ValueError(f"constants: {_short(name)} is not a placeholder of the graph")
        whole = type(order) is list and all(type(d) is int for d in order)
        if order is not None and not (whole and sorted(order) == list(range(len(order)))):
            raise ValueError(f"constants: {name}: {_short(order)} is not a permutation of dimensions")
    inputs = [nodes[n] for n in specs if n in nodes and nodes[n].op == "placeholder"]
    if len(inputs) != len(specs):
        raise ValueError("inputs: a name is not a placeholder of the graph")
    outputs = len(next(n for n in nodes.values() if n.op == "output").args[0])
    grids = {n: _grids(n, g, value["kernels"]) for n, g in value.get("grids", {}).items()}  # of nodes with kernels
    return GraphDef(
        graph=reader.graph,
        inputs=inputs,
        input_specs=list(specs.values()),
        in_spec=from_nesting(value["in"], len(inputs), arguments=True),
        out_spec=from_nesting(value["out"], outputs),
        ranges={s: _range(s, r) for s, r in value["ranges"].items()},
        guards=_guards(value.get("guards", []), specs),
        notes=tuple(_expect(n, str, "notes") for n in value["notes"]),
        constants=value["constants"],
        kernels={nodes[n]: name for n, name in value["kernels"].items()},
        packed={n: _expect(p, dict, f"packed {_short(n)}") for n, p in value["packed"].items()},
        torch_nodes={nodes[n] for n in reader.torch_names},
        grids={nodes[n]: g for n, g in grids.items()},
        input_names=_names(value, "inputs", len(inputs)),
        output_names=_names(value, "outputs", outputs),
    )


def _names(value: Mapping[str, Any], ends: str, count: int) -> tuple[str, ...]:
    """Return the names of all inputs or outputs, () where none are known."""
    names = value.get("names", {"inputs": [], "outputs": []}).get(ends)
    valid = type(names) is list and len(names) in (0, count) and all(type(n) is str for n in names)
    if not valid or any(len(n) > MAX_NAME for n in names) or (ends == "inputs" and len(set(names)) != len(names)):
        raise ValueError(f"names: expected {count} names of {ends} or none, got {_short(names)}")
    return tuple(names)


def _numbers(kernel: Any) -> list[float]:
    """Return scale and zero point of a kernel's input and of its residual, where it has one."""
    return [v for g in (kernel.input_grid, kernel.residual_grid) if g is not None for v in (g.scale, g.zero)]


def _grids(name: str, value: Any, kernels: Mapping[str, str]) -> tuple[ActivationQuant, ActivationQuant | None]:
    """Return the static grids of an operator's input and of its residual."""
    numbers = value if type(value) is list and len(value) in (2, 4) else [None, None]
    grids = []
    for scale, zero in zip(numbers[::2], numbers[1::2]):
        if name not in kernels or type(scale) is not float or not MIN_SCALE < scale < 1e36:
            raise ValueError(
                f"grids: {_short(name)}: expected an operator with a kernel and a scale, got {_short(value)}"
            )
        if type(zero) is not int or not 0 <= zero <= 255:
            raise ValueError(f"grids: {_short(name)}: expected a zero point from 0 to 255, got {_short(zero)}")
        grids.append(ActivationQuant(8, scale, zero))
    return grids[0], grids[1] if len(grids) > 1 else None


def _check_keys(value: Any) -> None:
    if type(value) is not dict or type(value.get("schema")) is not int:
        raise ValueError('expected an object with a whole number "schema"')
    schema = value["schema"]
    if schema not in READABLE:
        newer = "written by a newer version of Rarefy" if schema > SCHEMA else "unknown"
        raise ValueError(f"schema {schema} is {newer}; this version reads schemas {' and '.join(map(str, READABLE))}")
    keys = [k for k in KEYS if schema >= ADDED_IN.get(k, 1)]
    if set(value) != set(keys):
        raise ValueError(f"expected an object with {', '.join(keys)}, got {_short(sorted(value))}")
    for name in keys[1:]:
        if name not in ("in", "out"):
            _expect(value[name], list if name in ("inputs", "notes", "torch", "nodes", "guards") else dict, name)
    for name, packed in value["kernels"].items():
        _expect(packed, str, f"kernels: {_short(name)}")


@dataclass
class _Reader:
    """Builds the graph from JSON node by node, and checks each.

    Attributes:
        value: the JSON.
        specs: what is expected of each input, by name.
        nodes: the nodes so far, by name.
        kinds: what each node's output is, see `op_registry`.
        weights: the placeholders of constants; False where only the packed weight is stored.
        torch_names: the names of the engine's operators that torch runs faster.
    """

    value: dict[str, Any]
    specs: dict[str, Any]
    graph: fx.Graph = field(default_factory=fx.Graph)
    nodes: dict[str, Node] = field(default_factory=dict)
    kinds: dict[Node, str] = field(default_factory=dict)
    weights: dict[Node, bool] = field(default_factory=dict)
    torch_names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        entries, kernels = self.value["nodes"], self.value["kernels"]
        if len(entries) > MAX_NODES:
            raise ValueError(f"expected at most {MAX_NODES} nodes, got {len(entries)}")
        self.torch_names = {_expect(n, str, "torch") for n in self.value.get("torch", ())}
        for i, entry in enumerate(entries):
            self._read_entry(i, entry, last=i + 1 == len(entries))
        if not entries or next(reversed(self.nodes.values())).op != "output":
            raise ValueError("the last node must be the output")
        wrong = next((n for n in kernels if n not in self.nodes or self.nodes[n].op != "call_function"), None)
        if wrong is not None:
            raise ValueError(f"kernels: {_short(wrong)} is not an operator of the graph")
        for n in self.torch_names:
            if n not in self.nodes or self.nodes[n].target not in BY_TARGET or n in kernels:
                raise ValueError(f"torch: {_short(n)} is not an operator of the engine without a packed weight")
        if set(self.value["packed"]) != set(kernels.values()):
            raise ValueError(f"packed: {_short(sorted(self.value['packed']))} are not the weights that kernels name")

    def _read_entry(self, i: int, entry: Any, last: bool) -> None:
        if type(entry) is not list or len(entry) != 5 or any(type(x) is not str for x in entry[:3]):
            raise ValueError(f"node {i}: expected [name, op, target, args, kwargs], got {_short(entry)}")
        name, op, target, args, kwargs = entry
        assert isinstance(target, str)
        if not NAME.fullmatch(name) or name in self.nodes:
            raise ValueError(f"node {i}: expected an unused name of letters, digits and _, got {_short(name)}")
        if self.value["schema"] == 1:
            target = OLD_OP_NAMES.get(target, target)
        try:
            if op == "output" and not last:
                raise ValueError("the output must be the last node")
            positional = [self._argument(v) for v in _expect(args, list, "args")]
            node = self._new_node(op, target, positional, _expect(kwargs, dict, "kwargs"))
            self.nodes[name] = node
            if op == "placeholder":
                self._note_placeholder(node, name)
            elif op == "output":
                self._check_output(node)
            else:
                self.kinds[node] = op_registry.check_call(node.target, node.args, node.kwargs, self.kinds, self.weights)
                node.target = CHECKED.get(node.target, node.target)
                self._check_weight(node, name)
        except ValueError as error:
            raise ValueError(f"node {_short(name)}: {error}") from error
        node.name = name

    def _new_node(self, op: str, target: str, args: list[Any], kwargs: dict[str, Any]) -> Node:
        if op == "placeholder" and not args and not kwargs:
            return self.graph.placeholder("x")  # renamed by the caller
        if op == "output" and len(args) == 1 and not kwargs and isinstance(args[0], list | tuple):
            return self.graph.output(tuple(args[0]))
        function = op_registry.find(target) if op == "call_function" else None
        if function is None:
            raise ValueError(f"{_short(op)} of {_short(target)} is not allowed in a saved graph")
        kinds = BY_TARGET[function].arguments[len(args) :] if function in BY_TARGET else ()
        if all(k.endswith("?") for k in kinds):  # arguments that an older version did not have
            args += [None] * len(kinds)
        return self.graph.call_function(function, tuple(args), {n: self._argument(v) for n, v in kwargs.items()})

    def _note_placeholder(self, node: Node, name: str) -> None:
        """Note what a placeholder stands for: an input, a constant, a weight that is stored packed, or the cache."""
        constants = self.value["constants"]
        if name == CACHE and name not in self.specs and name not in constants:
            self.kinds[node] = op_registry.CACHE
            return
        if name not in self.specs:
            self.weights[node] = name in constants
        spec = self.specs.get(name)
        if name in constants or isinstance(spec, InputSpec):
            self.kinds[node] = op_registry.TENSOR
        elif name in self.specs and type(spec) in (bool, int, float):
            self.kinds[node] = op_registry.NUMBER

    def _check_weight(self, node: Node, name: str) -> None:
        """Raise ValueError unless an operator with a weight has it, packed or as a constant."""
        spec, packed = BY_TARGET.get(node.target), self.value["kernels"].get(name)
        weight = None if spec is None else spec.argument(node, "weight")
        if weight is None:
            if packed is not None:
                names = ", ".join(s.name for s in BY_TARGET.values() if s.packed_formats)
                raise ValueError(f"has a packed weight, which only {names} have")
        elif packed is None and not self.weights[weight]:
            raise ValueError(f"its weight {weight.name} is missing: it is neither a constant nor packed")
        elif packed is None and node.target is linear and self.value["kernels"] and name not in self.torch_names:
            raise ValueError("has no packed weight, but other operators have one")

    def _check_output(self, node: Node) -> None:
        for value in node.args[0]:
            tensor = isinstance(value, fx.Node) and self.kinds.get(value) in (op_registry.TENSOR, op_registry.NUMBER)
            if not tensor and not (value is None or type(value) in (bool, int, float, str)):
                raise ValueError(f"expected tensors and plain values as outputs, got {_short(value)}")

    def _argument(self, value: Any) -> Any:
        return _argument(value, self.nodes, 0)


def _argument(value: Any, nodes: Mapping[str, Node], depth: int) -> Any:
    """Return the argument that JSON describes."""
    if value is None or type(value) in (bool, str, float):
        return value
    if type(value) is int and -MAX_INT <= value < MAX_INT:
        return value
    if depth > MAX_DEPTH:
        raise ValueError(f"arguments are nested more than {MAX_DEPTH} levels deep")
    if type(value) is list:
        return [_argument(v, nodes, depth + 1) for v in value]
    if type(value) is not dict or len(value) != 1:
        raise ValueError(f"{_short(value)} is not a valid argument")
    ((kind, inner),) = value.items()
    if kind == "node" and type(inner) is str:
        if inner not in nodes:
            raise ValueError(f"reads {_short(inner)}, which is not an earlier node")
        return nodes[inner]
    if kind in ("tuple", "slice") and type(inner) is list and (kind == "tuple" or len(inner) == 3):
        parts = [_argument(v, nodes, depth + 1) for v in inner]
        return tuple(parts) if kind == "tuple" else slice(*parts)
    if type(inner) is not str or inner not in NAMED_VALUES.get(kind, {}):
        raise ValueError(f"{_short(value)} is not a valid argument")
    return NAMED_VALUES[kind][inner]


def _input_from_json(value: Any) -> tuple[str, Any]:
    """Return the name of an input, and what is expected of it."""
    if type(value) is not list or len(value) != 2 or type(value[0]) is not str or type(value[1]) is not dict:
        raise ValueError(f"inputs: expected [name, specification], got {_short(value)}")
    name, fields = value
    if set(fields) == {"value"}:
        return name, _argument(fields["value"], {}, 0)
    dtype, sizes = fields.get("dtype"), fields.get("sizes")
    if set(fields) != {"dtype", "sizes"} or type(dtype) is not str or dtype not in NAMED_VALUES["dtype"]:
        raise ValueError(f"input {name}: expected dtype and sizes, got {_short(fields)}")
    valid = type(sizes) is list and all(
        (type(s) is int and 0 <= s <= MAX_SIZE) or (type(s) is str and SYMBOL.fullmatch(s)) for s in sizes
    )
    if not valid:
        raise ValueError(f"input {name}: expected sizes as numbers and names of open sizes, got {_short(sizes)}")
    return name, InputSpec(NAMED_VALUES["dtype"][dtype], tuple(sizes))


def _guards(texts: list[Any], specs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the conditions on sizes; ValueError unless each is one, and reads only sizes that inputs have."""
    if len(texts) > MAX_GUARDS:
        raise ValueError(f"guards: expected at most {MAX_GUARDS} conditions, got {len(texts)}")
    sizes = [s for spec in specs.values() if isinstance(spec, InputSpec) for s in spec.sizes if type(s) is str]
    known = {s for s in sizes if s.isidentifier()}
    for text in (*texts, *(s for s in sizes if s not in known)):
        unknown = parse(_expect(text, str, "guards")).names - known
        if unknown:
            raise ValueError(f"guards: {_short(text)} reads {min(unknown)}, which is no size of an input")
    return tuple(texts)


def _range(symbol: str, value: Any) -> tuple[int, int]:
    valid = type(value) is list and len(value) == 2 and all(type(n) is int for n in value)
    if not SYMBOL.fullmatch(symbol) or not valid or not 0 <= value[0] <= value[1] <= MAX_SIZE:
        raise ValueError(f"ranges[{_short(symbol)}]: expected [smallest, largest], got {_short(value)}")
    return value[0], value[1]


def _expect(value: Any, kind: type, where: str) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{where}: expected {kind.__name__}, got {_short(value)}")
    return value


def _short(value: object) -> str:
    text = "a tensor" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
