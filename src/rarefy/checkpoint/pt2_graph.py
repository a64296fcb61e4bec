"""The graph of an exported program in JSON, as nodes of torch.fx: only operators of `op_registry` are called."""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from rarefy.checkpoint.pt2_archive import DTYPES
from rarefy.common.errors import ModelError
from rarefy.compiler import op_registry
from rarefy.compiler.checked_ops import CHECKED
from rarefy.compiler.op_registry import NUMBER, SEVERAL, TENSOR

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,499}")
MAX_NODES = 100_000
STRIDED = 7
RANK = "rarefy_rank"  # of a node's metadata: the number of dimensions of its output
MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
SPECIAL_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
CHECKS = (  # return nothing, and only check what the program was exported with
    "_assert_tensor_metadata.default", "_assert_async.msg", "_assert_scalar.default", "sym_constrain_range.default",
    "sym_constrain_range_for_size.default",
)  # fmt: skip
DROPOUTS = ("dropout.default", "dropout_.default", "feature_dropout.default", "feature_dropout_.default")
MAYBE_VIEWS = ("aten::reshape", "aten::contiguous", "aten::flatten", "aten::to")  # or copies: schemas do not say
IN_PLACE = frozenset(("detach.default", "fill.Tensor", "copy.default", "zero.default"))  # beside those of `op_registry`


def plain_name(text: Any) -> str:
    """Return a name of a node or argument; ValueError for what generated code could not contain."""
    if not isinstance(text, str) or not NAME.fullmatch(text) or keyword.iskeyword(text) or text == "self":
        raise ValueError(f"{str(text)[:60]!r} is no name")
    return text


def find_operator(target: str) -> Any:
    """Return the operator of a name in an exported program; ModelError for one that no graph may call."""
    name = target.removeprefix("torch.ops.").replace("_operator.", "operator.", 1)
    known = op_registry.find(name)
    family, _, rest = name.partition(".")
    if known is None and family == "aten":
        packet, _, overload = rest.partition(".")
        pure = f"{packet.removesuffix('_')}.{overload}"
        if packet.endswith("_") and (pure in op_registry.ATEN or pure in IN_PLACE):
            known = getattr(getattr(torch.ops.aten, packet, None), overload, None)
    if known is None:
        raise ModelError(f"the operator {target[:100]} is not supported: no graph from a file may call it")
    return known


class Nodes:
    """The nodes of a graph so far, by their names in the file, and what each returns."""

    def __init__(self, graph: fx.Graph, ranks: Mapping[str, int]):
        self.graph, self.ranks = graph, ranks
        self.by_name: dict[str, fx.Node] = {}
        self.kinds: dict[fx.Node, str] = {}

    def add(self, name: str, node: fx.Node, kind: str = TENSOR) -> None:
        """Add a node."""
        if plain_name(name) in self.by_name:
            raise ValueError(f"{name} is twice in the graph")
        self.by_name[name], self.kinds[node] = node, kind
        node.meta[RANK] = self.ranks.get(name)


# (operator, arguments by name, path and class of the module that called it): the call of a layer
Layer = Callable[[Any, Mapping[str, Any], tuple[str, str]], fx.Node | None]


def add_call(nodes: Nodes, call: Mapping[str, Any], layer: Layer) -> None:
    """Add a node of a file to a graph.

    Args:
        nodes: the nodes before it.
        call: the node as JSON.
        layer: returns the call of a module where one computes the same, else None.

    Raises:
        ModelError: the operator is not supported.
        ValueError: its arguments do not fit it.
    """
    target = call["target"]
    aten = target.removeprefix("torch.ops.aten.")
    if aten in CHECKS or (call["outputs"] and all("as_none" in o for o in call["outputs"])):
        return  # of the second kind are calls whose error the model caught while torch traced it
    function = None if aten in DROPOUTS else find_operator(target)
    values = {str(i["name"]): argument(i["arg"], nodes) for i in call["inputs"]}
    if function is None:
        if values.get("train") is not False:
            raise ModelError("the program drops activations: export the model in evaluation mode, after model.eval()")
        nodes.by_name[_output_name(call["outputs"][0])] = next(iter(values.values()))
        return
    names = call["outputs"]
    node = None
    if isinstance(function, torch._ops.OpOverload):
        args, kwargs = _split(function, values)
        op_registry.check_call(function, args, kwargs, nodes.kinds, {})
        if function._schema.is_mutable and aten != "detach_.default" and _reads_weight(args[0]):
            raise ModelError("the program changes its buffers when it is called: export a model that does not")
        named = {**dict(zip((a.name for a in function._schema.arguments), args)), **kwargs}
        node = layer(function, named, _caller(call.get("metadata")))
    else:
        args, kwargs = tuple(values.values()), {}
        op_registry.check_call(function, args, kwargs, nodes.kinds, {})
    kind = op_registry.output_kind(function)
    if node is None:
        node = nodes.graph.call_function(CHECKED.get(function, function), args, kwargs)
    if kind != SEVERAL:
        nodes.add(_output_name(names[0]), node, kind)
        return
    nodes.kinds[node] = SEVERAL
    listed = names[0]["as_tensors"] if len(names) == 1 and "as_tensors" in names[0] else [n["as_tensor"] for n in names]
    for i, name in enumerate(listed):
        nodes.add(name["name"], nodes.graph.call_function(operator.getitem, (node, i)))


def _reads_weight(node: Any) -> bool:
    """Return whether a node is a weight, or a view of one."""
    while isinstance(node, fx.Node) and node.op == "call_function" and node.args:
        schema = getattr(node.target, "_schema", None)
        views = schema is None or any(r.alias_info for r in schema.returns) or schema.name in MAYBE_VIEWS
        node = node.args[0] if views else None
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _caller(metadata: Any) -> tuple[str, str]:
    """Return the path and the class of the innermost module that was called, "" where the file has none."""
    stack = metadata.get("nn_module_stack") if isinstance(metadata, Mapping) else None
    parts = stack.split(";")[-1].split(",") if isinstance(stack, str) else []
    return (parts[1], parts[2].rpartition(".")[2]) if len(parts) == 3 else ("", "")


def _output_name(output: Mapping[str, Any]) -> str:
    """Return the name of what a node returns."""
    (kind, value), *_ = output.items()
    return plain_name(value["name"] if kind == "as_tensor" else value["as_name"])


def _split(function: Any, values: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments by name as positional ones, as far as there are any without a gap, and keywords."""
    args, rest = [], dict(values)
    for a in function._schema.arguments:
        if a.kwarg_only or a.name not in rest:
            break
        args.append(rest.pop(a.name))
    return tuple(args), rest


def argument(value: Mapping[str, Any], nodes: Nodes) -> Any:
    """Return an argument of a node, of its JSON; ValueError for a kind that no operator here takes."""
    ((kind, content),) = value.items()
    if kind == "as_none":
        return None
    if kind == "as_optional_tensor":
        return argument(content, nodes)
    if kind == "as_tensor":
        return nodes.by_name[content["name"]]
    if kind == "as_tensors":
        return [nodes.by_name[t["name"]] for t in content]
    if kind == "as_optional_tensors":
        return [argument(t, nodes) for t in content]
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return _symbolic(content, nodes)
    if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
        return [_symbolic(v, nodes) for v in content]
    if kind in LISTS:
        return [LITERALS[LISTS[kind]](v) for v in content]
    if kind in LITERALS:
        return LITERALS[kind](content)
    raise ValueError(f"an argument of the kind {str(kind)[:40]} is not supported")


def _symbolic(value: Mapping[str, Any], nodes: Nodes) -> Any:
    ((kind, content),) = value.items()
    if kind != "as_name":
        return LITERALS[kind](content)
    node = nodes.by_name[content]
    if nodes.kinds[node] != NUMBER:
        raise ValueError(f"{node} is no number")
    return node


def _is(expected: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) is not expected:
            raise ValueError(f"expected {expected.__name__}, got {str(value)[:60]}")
        return value

    return check


def _float(value: Any) -> float:
    value = SPECIAL_FLOATS.get(value, value) if isinstance(value, str) else value
    return float(value) if type(value) is int else _is(float)(value)


def _device(value: Mapping[str, Any]) -> torch.device:
    if value["type"] != "cpu":
        raise ModelError(
            f"the program was exported on the device {str(value['type'])[:20]}: export the model on the CPU"
        )
    return torch.device("cpu")


def _layout(value: Any) -> torch.layout:
    if value != STRIDED:
        raise ValueError("only strided tensors are supported")
    return torch.strided


LITERALS: dict[str, Callable[[Any], Any]] = {
    "as_int": _is(int),
    "as_float": _float,
    "as_bool": _is(bool),
    "as_string": _is(str),
    "as_scalar_type": DTYPES.__getitem__,
    "as_memory_format": MEMORY_FORMATS.__getitem__,
    "as_layout": _layout,
    "as_device": _device,
}
LISTS = {"as_ints": "as_int", "as_floats": "as_float", "as_bools": "as_bool"}

ROUNDING = ("mul.Tensor", "sub.Tensor", "clamp.default", "add.Tensor", "round.default", "div.Tensor")  # from the last


def fuse_rounding(graph: fx.Graph) -> None:
    """Replace what rounds values to a static grid of 8 bits, as `export` writes it, by the engine's operator."""
    for node in list(graph.nodes):
        chain = [node]
        while len(chain) < len(ROUNDING) and isinstance(chain[-1].args[0] if chain[-1].args else None, fx.Node):
            chain.append(chain[-1].args[0])  # type: ignore[arg-type]
        if [str(n.target).removeprefix("aten.") for n in chain] != list(ROUNDING):
            continue
        mul, sub, clamp, add, rounding, div = chain
        scale, zero = mul.args[1], sub.args[1]
        plain = isinstance(scale, float) and type(zero) is int and not any(n.kwargs for n in chain)
        same = div.args[1] == scale and add.args[1] == zero and clamp.args[1:] == (0, 255) and len(rounding.args) == 1
        if plain and same:
            with graph.inserting_before(node):
                fused = graph.call_function(torch.ops.rarefy.fake_quantize.default, (div.args[0], scale, zero))
            node.replace_all_uses_with(fused)
