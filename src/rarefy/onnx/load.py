"""ONNX files as torch modules: for those whose model is a file that DeepSparse or ONNX Runtime ran."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from rarefy.common.errors import ModelError, first_line
from rarefy.model.activation_quant import get_activation_quant, set_activation_quant_
from rarefy.model.quant_grid import record_grid_
from rarefy.onnx import fusions, qdq
from rarefy.onnx import graph as onnx_graph
from rarefy.onnx import modules as onnx_modules
from rarefy.onnx.graph import OPSET, Graph, attribute
from rarefy.onnx.qdq import Rounded
from rarefy.onnx.read import fixed_, read, simplified
from rarefy.onnx.verify import prove

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
STEPS = (
    qdq.unpack,
    qdq.integers,
    onnx_graph.fold,
    qdq.weights,
    onnx_graph.fold,
    qdq.pairs,
    onnx_graph.identities,
    fusions.gelus,
    fusions.layer_norms,
    onnx_modules.stands,
    onnx_graph.lower,
    onnx_graph.end,
)
SCOPES = "pkg.torch.onnx.name_scopes"
ALONE = ("LayerNormalization", "MaxPool", "BatchNormalization", "Dropout")  # of whose outputs the first is read
MODULES = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "BatchNormalization")
OPERATOR = re.compile(r"[A-Z][A-Za-z]+(_\d+|_quant)*")
WEIGHT = re.compile(r"[._]weight$")
WORD = re.compile(r"[A-Za-z0-9_-]+")


def from_onnx(path: str | Path, *, shapes: Mapping[str, Sequence[int]] | None = None, example: Any = None) -> nn.Module:
    """Return the model of an ONNX file, in evaluation mode: called with the file's inputs in their order or by their
    names, it gives the file's outputs (a tensor, or a list of them).

    Matrix products with constant weights become Linear layers, lookups Embedding, written out norms and GELUs LayerNorm
    and GELU, convolutions Conv; where the file knows the modules that it came from, layers have their names. Integer
    operators and QuantizeLinear / DequantizeLinear become weights that lie on their grid and layers whose inputs are
    rounded, as `quantize_` makes them (where they are rounded in each call, by a scale for each row, not one for all),
    so `save` stores and `accelerate_` runs their codes. Zeros stay zeros: `adopt_` makes masks of them.

    shapes  input -> its shape from here on, where the file leaves dimensions open: what follows from it is then
            computed here, not in every call
    example what the module is compared with ONNX Runtime on: a tensor, a tuple of them, or a dict by the names of the
            file's inputs; noise by default, in which whole numbers are 0 and 1
    Every module is proved so before it is returned: outputs are those of ONNX Runtime up to rounding (of the largest
    1e-3; where activations are rounded to codes 5 % of the norm, half where in each call, as rows then have scales of
    their own). Where noise of no size can be run, a warning says so. Versions 9 and up of ONNX's operators are read.
    Needs the extra [onnx]. Raises ContainerError (no file, no ONNX), ModelError (what no torch module is known for, by
    name; other outputs). Reads nothing outside the file's folder. O(weights), and a call.
    """
    model = read(path)
    fixed_(model, path, shapes)
    graph = onnx_graph.graph_of(simplified(model))
    for step in STEPS:
        graph.nodes = list(step(graph))
    onnx_graph.prune(graph)
    names = _named(graph)
    proto = _proto(graph)
    _check(proto)
    made = _converted(proto)
    onnx_modules.replace_(made)
    _stand_in_(made, graph, names)
    _layers_(made, graph)
    _rounding_(made)
    module = _renamed(made, {safe: pretty for safe, pretty in names.values()}).eval()
    prove(module, path, example, shapes or {}, _coded(graph))
    return module


def _coded(graph: Graph) -> str:
    """How activations are rounded: not, by what is known, or in each call."""
    if not graph.rounded:
        return ""
    return "dynamic" if any(i.scale is None for i in graph.rounded.values()) else "static"


def _named(graph: Graph) -> dict[str, tuple[str, str]]:
    """Name nodes and values anew, as names in code may be; return what nodes were called: (new name, dotted name)."""
    values: dict[str, str] = {}
    inputs = [i.name for i in graph.model.graph.input]
    for i, name in enumerate(inputs):
        word = re.sub(r"\W", "_", name, flags=re.ASCII)
        means = keyword.iskeyword(word) or hasattr(builtins, word) or word in ("self", "torch")
        word = f"input_{word}" if means or not word[:1].isalpha() else word
        while word in values.values():
            word += f"_{i}"
        values[name] = word
    found: dict[str, tuple[str, str]] = {}
    taken = Counter[str]()
    for i, node in enumerate(graph.nodes):
        stands = graph.stands.get(node.output[0])
        pretty = _path(node, isinstance(stands, (nn.LayerNorm, nn.GELU)))
        taken[pretty] += 1
        pretty = pretty if taken[pretty] == 1 else f"{pretty}_{taken[pretty] - 1}"
        node.name = f"node_{i}"
        found[node.output[0]] = (node.name, pretty)
        for side in (node.input, node.output):
            for at, name in enumerate(side):
                if name:
                    side[at] = values.setdefault(name, f"value_{len(values)}_")
    for value in (*graph.model.graph.input, *graph.model.graph.output):
        value.name = values.setdefault(value.name, f"value_{len(values)}_")
    for known in ("constants", "rounded", "grids"):
        setattr(graph, known, {values[n]: v for n, v in getattr(graph, known).items() if n in values})
    return found


def _path(node: Any, module: bool) -> str:
    """A dotted name for a node: of the module whose weight it reads, of the one it was traced in, or its own."""
    alone = module or node.op_type in MODULES
    weights = [n for n in node.input if WEIGHT.search(n)]
    if weights and alone:
        return _words(WEIGHT.sub("", weights[0]).split("."))
    scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "")
    try:
        scope = ast.literal_eval(scopes) if len(scopes) < 10_000 else []
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        scope = []
    if isinstance(scope, list) and len(scope) > 1 and all(isinstance(s, str) for s in scope) and scope[-2]:
        return _words([*scope[-2].split("."), *(() if alone else (node.op_type,))])
    words: list[str] = []
    for word in (node.name or node.op_type).strip("/").split("/"):
        if words and word.startswith(f"{words[-1]}."):
            words.pop()  # torch writes "layer1/layer1.0"
        words.append(word)
    if alone and len(words) > 1 and OPERATOR.fullmatch(words[-1]):
        words.pop()
    return _words([w for word in words for w in word.split(".")])


def _words(words: list[str]) -> str:
    found = [w for word in words if (w := "_".join(WORD.findall(word)))]
    return ".".join(f"{w}_" if keyword.iskeyword(w) else w for w in found) or "node"


def _proto(graph: Graph) -> Any:
    """The graph as ONNX again."""
    from onnx import helper, numpy_helper

    old = graph.model
    held = [numpy_helper.from_array(a.copy(), n) for n, a in graph.constants.items()]
    domains = {n.domain for n in graph.nodes} - {"", "ai.onnx"}
    more = [o for o in old.opset_import if o.domain in domains]
    made = helper.make_graph(graph.nodes, "graph", old.graph.input, old.graph.output, held)
    opsets = [helper.make_opsetid("", min(graph.opset, OPSET)), *more]
    return helper.make_model(made, opset_imports=opsets, ir_version=max(3, min(old.ir_version, 10)))


def _check(proto: Any) -> None:
    """ModelError for operators that no torch module is known for, all of them at once."""
    import onnx
    from onnx2torch.node_converters import get_converter

    opsets = {o.domain: o.version for o in proto.opset_import}
    unknown = Counter[str]()
    for node in proto.graph.node:
        if node.op_type in ALONE and len([o for o in node.output if o]) > 1:
            raise ModelError(f"the 2nd output of a {node.op_type} is not read")
        try:
            get_converter(node.op_type, opsets.get(node.domain, 1), node.domain)
        except NotImplementedError:
            unknown[f"{node.domain}.{node.op_type}".lstrip(".")] += 1
    if unknown:
        listed = ", ".join(f"{name} ({count})" for name, count in unknown.most_common())
        raise ModelError(f"operators without a torch module: {listed}")
    try:
        onnx.checker.check_model(proto)
    except Exception as error:
        raise ModelError(f"something newer than version {OPSET} of ONNX's operators: {first_line(error)}") from None


def _converted(proto: Any) -> fx.GraphModule:
    from onnx2torch import convert

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return convert(proto, save_input_names=True)
    except Exception as error:  # it raises whatever a node it cannot read makes it raise
        raise ModelError(f"onnx2torch cannot read this graph: {first_line(error)}") from error


def _stand_in_(model: fx.GraphModule, graph: Graph, names: dict[str, tuple[str, str]]) -> None:
    """Put modules where Identities stand for them."""
    for old, module in graph.stands.items():
        if old in names:
            setattr(model, names[old][0], module)


def _layers_(model: fx.GraphModule, graph: Graph) -> None:
    """Matrix products with constants as Linear, lookups as Embedding; weights of one constant are one parameter."""
    calls = {n.target: n for n in model.graph.nodes if n.op == "call_module"}
    users, shared = graph.users(), dict[str, list[nn.Parameter]]()
    for node in graph.nodes:
        at = 0 if node.op_type == "Gather" else 1
        call, constant = calls[node.name], node.input[at] if len(node.input) > at else ""
        weight = graph.constants.get(constant)
        if weight is None or weight.ndim < 2 or weight.dtype.kind != "f":
            continue
        if node.op_type == "MatMul" and weight.ndim == 2:
            bias = _bias(graph, users, node, weight.shape[1])
            layer = nn.Linear(*weight.shape, bias=bias is not None, device="meta")
            layer.weight = nn.Parameter(torch.from_numpy(weight.T.copy()))
            call.args = call.args[:1]
            if bias is not None:
                add, array = bias
                layer.bias = nn.Parameter(torch.from_numpy(array.astype(weight.dtype)))
                calls[add.name].replace_all_uses_with(call)
                model.graph.erase_node(calls[add.name])
            setattr(model, node.name, layer)
        elif node.op_type == "Gather" and weight.ndim == 2 and not attribute(node, "axis", 0):
            call.args = call.args[1:]
            setattr(model, node.name, nn.Embedding.from_pretrained(torch.from_numpy(weight.copy()), freeze=False))
        layer = _layer_in(getattr(model, node.name))
        if layer is None:
            continue
        inputs = graph.rounded.get(node.input[0])
        if inputs is not None and inputs.bits == 8 and isinstance(layer, LAYERS):
            set_activation_quant_(layer, inputs)
        layer.weight = nn.Parameter(layer.weight.detach().contiguous())
        same = [p for p in shared.setdefault(constant, []) if torch.equal(p, layer.weight)]
        if same:
            layer.weight = same[0]
        else:
            shared[constant].append(layer.weight)
        grid = graph.grids.get(constant)
        if grid is not None and attribute(node, "alpha", 1.0) == 1.0:
            turned = tuple(layer.weight.shape) != weight.shape or node.op_type == "MatMul"
            turned = turned or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
            record_grid_(layer, "weight", grid.map(lambda t: t.T.contiguous()) if turned else grid)


def _bias(graph: Graph, users: dict[str, list[Any]], node: Any, size: int) -> tuple[Any, Any] | None:
    """The Add that alone reads a product, and the constant it adds to every row."""
    found = users.get(node.output[0], [])
    if len(found) != 1 or found[0].op_type != "Add" or node.output[0] in graph.outputs:
        return None
    arrays = [graph.constants[n] for n in found[0].input if n in graph.constants]
    return (found[0], arrays[0]) if len(arrays) == 1 and arrays[0].shape == (size,) else None


def _layer_in(module: nn.Module) -> Any:
    """The layer with weights that a module is, or has behind its padding."""
    return next((m for m in module.modules() if isinstance(m, (*LAYERS, nn.Embedding))), None)


def _rounding_(model: fx.GraphModule) -> None:
    """Give layers that round their inputs what is not rounded yet."""
    modules = dict(model.named_modules())
    for node in list(model.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], Rounded):
            continue
        for user in list(node.users):
            layer = _layer_in(modules[str(user.target)]) if user.op == "call_module" else None
            if layer is not None and get_activation_quant(layer) == modules[node.target].inputs:
                user.replace_input_with(node, node.args[0])
        if not node.users:
            model.graph.erase_node(node)


def _renamed(model: fx.GraphModule, pretty: dict[str, str]) -> nn.Module:
    """The same graph with its modules in a tree, by their dotted names."""
    root, kept = nn.Module(), (*LAYERS, nn.Embedding, nn.LayerNorm)
    calls = [n for n in model.graph.nodes if n.op == "call_module"]
    for node in sorted(calls, key=lambda n: not isinstance(getattr(model, n.target), kept)):
        parent, *words = root, *pretty[node.target].split(".")
        path = []
        for word in words[:-1]:
            while not _free(parent, word) and type(parent._modules.get(word)) is not nn.Module:
                word += "_"
            if _free(parent, word):
                parent.add_module(word, nn.Module())
            path.append(word)
            parent = parent.get_submodule(word)
        word = words[-1]
        while not _free(parent, word):
            word += "_"
        parent.add_module(word, getattr(model, node.target))
        node.target = ".".join((*path, word))
    for node in list(model.graph.nodes):
        if node.op == "get_attr" and not node.users:
            model.graph.erase_node(node)
        elif node.op == "get_attr":
            name = node.target.replace("initializers.onnx_initializer_", "constant_")
            root.register_buffer(name, model.get_buffer(node.target))
            node.target = name
    return fx.GraphModule(root, model.graph, "OnnxModel")


def _free(parent: nn.Module, word: str) -> bool:
    """Whether nothing of a module, its class's own things included, has a name."""
    return not hasattr(parent, word) and not hasattr(fx.GraphModule, word)
