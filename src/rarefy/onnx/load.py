"""Load ONNX files as torch modules."""

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
from rarefy.onnx.qdq import FakeQuantize
from rarefy.onnx.read import read, set_input_shapes_, simplify
from rarefy.onnx.verify import verify

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
PASSES = (
    qdq.expand_qlinear,
    qdq.fuse_integer_ops,
    onnx_graph.fold_constants,
    qdq.dequantize_weights,
    onnx_graph.fold_constants,
    qdq.fake_quantize_activations,
    onnx_graph.remove_identities,
    fusions.fuse_gelu,
    fusions.fuse_layer_norm,
    onnx_modules.substitute_modules,
    onnx_graph.to_opset_17,
    onnx_graph.separate_outputs,
)
SCOPES = "pkg.torch.onnx.name_scopes"
FIRST_OUTPUT = ("LayerNormalization", "MaxPool", "BatchNormalization", "Dropout")  # only the first is supported
MODULE_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", "BatchNormalization")
OPERATOR = re.compile(r"[A-Z][A-Za-z]+(_\d+|_quant)*")
WEIGHT = re.compile(r"[._]weight$")
NAME_PART = re.compile(r"[A-Za-z0-9_-]+")


def from_onnx(path: str | Path, *, shapes: Mapping[str, Sequence[int]] | None = None, example: Any = None) -> nn.Module:
    """Return the model of an ONNX file as a module in evaluation mode, verified against ONNX Runtime.

    The module takes the file's inputs in their order or by their names, and returns the file's outputs: a tensor, or a
    list of them. Matrix products with constant weights become Linear layers, lookups Embedding, decomposed norms and
    GELUs LayerNorm and GELU, convolutions Conv; where the file records the modules that it was traced from, layers have
    their names. Integer operators, QuantizeLinear and DequantizeLinear become quantized weights and activations as
    `quantize_` makes them, so `save` stores their codes and `accelerate_` runs them; dynamic activation scales become
    one for each row. Zeros stay zeros: `adopt_` makes masks of them. Operators from version 9 on are supported.
    Needs the extra [onnx]. Reads nothing outside the file's folder. O(weights), and one call of both.

    Args:
        path: the ONNX file.
        shapes: fixed shapes of inputs whose dimensions the file leaves dynamic; what depends on them is then computed
            once, here.
        example: inputs for the comparison: a tensor, a tuple of tensors, or a dict by the names of the inputs; random
            by default, with 0 and 1 for integers.

    Returns:
        The module. Its outputs equal those of ONNX Runtime up to rounding: 1e-3 of the largest; with quantized
        activations 5 % of the norm, and 50 % with dynamic ones, which get finer scales here. A warning says if ONNX
        Runtime could run no random input.

    Raises:
        ContainerError: there is no such file, or it is not an ONNX file.
        ModelError: operators without a torch module, by name; outputs that differ; a missing package.

    Example:
        >>> import tempfile
        >>> from rarefy.onnx.export import export_onnx
        >>> file = export_onnx(nn.Linear(4, 2), torch.randn(1, 4), tempfile.mkdtemp() + "/net.onnx")
        >>> from_onnx(file)(torch.randn(3, 4)).shape
        torch.Size([3, 2])
    """
    model = read(path)
    set_input_shapes_(model, path, shapes)
    graph = onnx_graph.read_graph(simplify(model))
    for run_pass in PASSES:
        graph.nodes = list(run_pass(graph))
    onnx_graph.remove_unused(graph)
    names = _rename_values(graph)
    proto = _proto(graph)
    _check_convertible(proto)
    converted = _convert(proto)
    onnx_modules.replace_slices_(converted)
    _insert_modules_(converted, graph, names)
    _make_layers_(converted, graph)
    _remove_fake_quantize_(converted)
    module = _to_tree(converted, dict(names.values())).eval()
    verify(module, path, example, shapes or {}, _activation_kind(graph))
    return module


def _activation_kind(graph: Graph) -> str:
    """How activations are quantized: "" (not at all), "static" or "dynamic"."""
    if not graph.quantized:
        return ""
    return "dynamic" if any(i.scale is None for i in graph.quantized.values()) else "static"


def _rename_values(graph: Graph) -> dict[str, tuple[str, str]]:
    """Give nodes and values names that are valid in code; return, by a node's output, its new and its dotted name."""
    values: dict[str, str] = {}
    for i, name in enumerate([i.name for i in graph.model.graph.input]):
        valid = re.sub(r"\W", "_", name, flags=re.ASCII)
        reserved = keyword.iskeyword(valid) or hasattr(builtins, valid) or valid in ("self", "torch")
        valid = f"input_{valid}" if reserved or not valid[:1].isalpha() else valid
        while valid in values.values():
            valid += f"_{i}"
        values[name] = valid
    names: dict[str, tuple[str, str]] = {}
    count = Counter[str]()
    for i, node in enumerate(graph.nodes):
        module = graph.modules.get(node.output[0])
        dotted = _dotted_name(node, isinstance(module, (nn.LayerNorm, nn.GELU)))
        count[dotted] += 1
        dotted = dotted if count[dotted] == 1 else f"{dotted}_{count[dotted] - 1}"
        node.name = f"node_{i}"
        names[node.output[0]] = (node.name, dotted)
        for side in (node.input, node.output):
            for at, name in enumerate(side):
                if name:
                    side[at] = values.setdefault(name, f"value_{len(values)}_")
    for value in (*graph.model.graph.input, *graph.model.graph.output):
        value.name = values.setdefault(value.name, f"value_{len(values)}_")
    for known in ("constants", "quantized", "grids"):
        setattr(graph, known, {values[n]: v for n, v in getattr(graph, known).items() if n in values})
    return names


def _dotted_name(node: Any, is_module: bool) -> str:
    """A module's path for a node: of the module whose weight it reads, of the one it was traced in, or its own."""
    whole = is_module or node.op_type in MODULE_OPS
    weights = [n for n in node.input if WEIGHT.search(n)]
    if weights and whole:
        return _join(WEIGHT.sub("", weights[0]).split("."))
    scopes = next((p.value for p in node.metadata_props if p.key == SCOPES), "")
    try:
        scope = ast.literal_eval(scopes) if len(scopes) < 10_000 else []
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        scope = []
    if isinstance(scope, list) and len(scope) > 1 and all(isinstance(s, str) for s in scope) and scope[-2]:
        return _join([*scope[-2].split("."), *(() if whole else (node.op_type,))])
    parts: list[str] = []
    for part in (node.name or node.op_type).strip("/").split("/"):
        if parts and part.startswith(f"{parts[-1]}."):
            parts.pop()  # torch writes "layer1/layer1.0"
        parts.append(part)
    if whole and len(parts) > 1 and OPERATOR.fullmatch(parts[-1]):
        parts.pop()
    return _join([p for part in parts for p in part.split(".")])


def _join(parts: list[str]) -> str:
    """A dotted path of parts, without characters that attributes cannot have."""
    valid = [p for part in parts if (p := "_".join(NAME_PART.findall(part)))]
    return ".".join(f"{p}_" if keyword.iskeyword(p) else p for p in valid) or "node"


def _proto(graph: Graph) -> Any:
    """The graph as an ONNX model again."""
    from onnx import helper, numpy_helper

    old = graph.model
    held = [numpy_helper.from_array(a.copy(), n) for n, a in graph.constants.items()]
    domains = {n.domain for n in graph.nodes} - {"", "ai.onnx"}
    others = [o for o in old.opset_import if o.domain in domains]
    new = helper.make_graph(graph.nodes, "graph", old.graph.input, old.graph.output, held)
    opsets = [helper.make_opsetid("", min(graph.opset, OPSET)), *others]
    return helper.make_model(new, opset_imports=opsets, ir_version=max(3, min(old.ir_version, 10)))


def _check_convertible(proto: Any) -> None:
    """Raise ModelError for operators without a torch module, all of them at once."""
    import onnx
    from onnx2torch.node_converters import get_converter

    opsets = {o.domain: o.version for o in proto.opset_import}
    unknown = Counter[str]()
    for node in proto.graph.node:
        if node.op_type in FIRST_OUTPUT and len([o for o in node.output if o]) > 1:
            raise ModelError(f"the second output of a {node.op_type} is not supported")
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
        raise ModelError(f"it needs operators newer than ONNX version {OPSET}: {first_line(error)}") from None


def _convert(proto: Any) -> fx.GraphModule:
    from onnx2torch import convert

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return convert(proto, save_input_names=True)
    except Exception as error:  # onnx2torch raises many kinds of errors
        raise ModelError(f"onnx2torch cannot read this graph: {first_line(error)}") from error


def _insert_modules_(model: fx.GraphModule, graph: Graph, names: dict[str, tuple[str, str]]) -> None:
    """Replace the Identities of `Graph.substitute` by their modules."""
    for old, module in graph.modules.items():
        if old in names:
            setattr(model, names[old][0], module)


def _make_layers_(model: fx.GraphModule, graph: Graph) -> None:
    """Make Linear layers of matrix products with constants, and Embeddings of lookups; layers that read one constant
    share one parameter."""
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
        inputs = graph.quantized.get(node.input[0])
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
            transposed = tuple(layer.weight.shape) != weight.shape or node.op_type == "MatMul"
            transposed = transposed or (node.op_type == "Gemm" and not attribute(node, "transB", 0))
            record_grid_(layer, "weight", grid.map(lambda t: t.T.contiguous()) if transposed else grid)


def _bias(graph: Graph, users: dict[str, list[Any]], node: Any, size: int) -> tuple[Any, Any] | None:
    """The Add that alone reads a product, and the constant that it adds to every row."""
    nodes = users.get(node.output[0], [])
    if len(nodes) != 1 or nodes[0].op_type != "Add" or node.output[0] in graph.outputs:
        return None
    arrays = [graph.constants[n] for n in nodes[0].input if n in graph.constants]
    return (nodes[0], arrays[0]) if len(arrays) == 1 and arrays[0].shape == (size,) else None


def _layer_in(module: nn.Module) -> Any:
    """The layer with a weight that a module is, or contains after its padding."""
    return next((m for m in module.modules() if isinstance(m, (*LAYERS, nn.Embedding))), None)


def _remove_fake_quantize_(model: fx.GraphModule) -> None:
    """Remove fake quantization before layers that quantize their inputs in the same way."""
    modules = dict(model.named_modules())
    for node in list(model.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[node.target], FakeQuantize):
            continue
        for user in list(node.users):
            layer = _layer_in(modules[str(user.target)]) if user.op == "call_module" else None
            if layer is not None and get_activation_quant(layer) == modules[node.target].inputs:
                user.replace_input_with(node, node.args[0])
        if not node.users:
            model.graph.erase_node(node)


def _to_tree(model: fx.GraphModule, dotted: dict[str, str]) -> nn.Module:
    """The same graph with its modules in a tree, by their dotted names."""
    root, first = nn.Module(), (*LAYERS, nn.Embedding, nn.LayerNorm)  # layers choose their names first
    calls = [n for n in model.graph.nodes if n.op == "call_module"]
    for node in sorted(calls, key=lambda n: not isinstance(getattr(model, n.target), first)):
        parent, *parts = root, *dotted[node.target].split(".")
        path = []
        for part in parts[:-1]:
            while not _is_free(parent, part) and type(parent._modules.get(part)) is not nn.Module:
                part += "_"
            if _is_free(parent, part):
                parent.add_module(part, nn.Module())
            path.append(part)
            parent = parent.get_submodule(part)
        leaf = parts[-1]
        while not _is_free(parent, leaf):
            leaf += "_"
        parent.add_module(leaf, getattr(model, node.target))
        node.target = ".".join((*path, leaf))
    for node in list(model.graph.nodes):
        if node.op == "get_attr" and not node.users:
            model.graph.erase_node(node)
        elif node.op == "get_attr":
            name = node.target.replace("initializers.onnx_initializer_", "constant_")
            root.register_buffer(name, model.get_buffer(node.target))
            node.target = name
    return fx.GraphModule(root, model.graph, "OnnxModel")


def _is_free(parent: nn.Module, name: str) -> bool:
    """Whether neither a module nor its class has an attribute of that name."""
    return not hasattr(parent, name) and not hasattr(fx.GraphModule, name)
