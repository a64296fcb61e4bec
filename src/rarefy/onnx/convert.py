"""Convert an ONNX graph to a torch graph of modules and functions.

Nodes are converted in their order. What depends on constants alone is computed here. Sizes are followed one by one
(sizes.py). Operators with constant weights become layers (layers.py), others calls of their functions (operators/), as
modules where they have constants.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from rarefy.common.errors import ModelError, first_line
from rarefy.model.activation_quant import get_activation_quant, set_activation_quant_
from rarefy.model.quant_grid import record_grid_
from rarefy.onnx.binding import (
    attributes_of,
    check_count,
    evaluate,
    function_of,
    node_label,
    operator_name,
    options,
)
from rarefy.onnx.chunks import Slice, merge_slices_, slice_of
from rarefy.onnx.dtypes import DTYPES, WIDE_UNSIGNED, dtype_of, to_tensor
from rarefy.onnx.graph import Graph, Kind, constants_of, is_lookup
from rarefy.onnx.layers import LAYERS, Layer, Site
from rarefy.onnx.modules import FakeQuantize, Operator, Reshape
from rarefy.onnx.names import input_names, join, module_name, place
from rarefy.onnx.operators.arithmetic import BINARY, COMPARISONS
from rarefy.onnx.operators.shape import sizes_to_tensor, to_ints
from rarefy.onnx.operators.signature import signature_of
from rarefy.onnx.probe import dtype_of_probe, probe_call, probe_constant, probe_input, rank_of
from rarefy.onnx.sizes import SizeRules, Sizes, as_sizes

QUANTIZED_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
FIRST_NAMED = (*QUANTIZED_LAYERS, nn.Embedding, nn.LayerNorm)  # layers choose their names before other modules
CONTROL_FLOW = ("If", "Loop", "Scan")
ON_ELEMENTS = {**BINARY, **COMPARISONS}
MAX_DEPTH = 16  # of If within If


def convert(graph: Graph, example: Mapping[str, Tensor] | None = None) -> fx.GraphModule:
    """Return the torch graph of an ONNX graph; ModelError for what cannot be converted.

    Args:
        graph: the graph, after all passes.
        example: inputs by their names: their sizes are tried where the file leaves sizes open.
    """
    check_operators(graph)
    for word, values in (("input", graph.model.graph.input), ("output", graph.model.graph.output)):
        for value in values:
            if not value.type.HasField("tensor_type"):
                raise ModelError(f"the {word} {value.name} is no tensor")
            if word == "input" or value.type.tensor_type.elem_type:
                dtype_of(value.type.tensor_type.elem_type, f"the {word} {value.name}")
    converter = Converter(graph, example or {})
    converter.run(graph.nodes)
    return converter.finish()


def check_operators(graph: Graph) -> None:
    """Raise ModelError for operators without a function, all of them at once."""
    unknown = Counter[str]()
    for node in graph.nodes:
        if node.output[0] not in graph.modules and node.op_type != "If" and function_of(node) is None:
            unknown[operator_name(node)] += 1
    if unknown:
        listed = ", ".join(f"{name} ({count})" for name, count in unknown.most_common())
        raise ModelError(f"operators without a torch module: {listed}")


class Converter:
    """A torch graph that is being made.

    Attributes:
        graph: the ONNX graph.
        values: what a value of the ONNX graph is here: a constant, sizes, or a node of the torch graph.
    """

    def __init__(self, graph: Graph, example: Mapping[str, Tensor]):
        self.graph = graph
        self.torch_graph = fx.Graph()
        self.values: dict[str, Any] = {n: to_tensor(a) for n, a in graph.constants.items()}
        self.stored = set(graph.initializers)  # constants of the file: float ones are parameters
        self.modules: list[tuple[fx.Node, str, nn.Module]] = []
        self.held: dict[str, fx.Node] = {}  # nodes that read constants
        self.as_tensors: dict[Any, fx.Node] = {}  # nodes that make tensors of sizes
        self.rules = SizeRules(self._emit_size)
        self.weights: dict[str, list[Any]] = {}
        self.users = graph.users()
        self.done: set[str] = set()  # outputs that a layer before took over
        self.slices: list[Slice] = []
        self.depth = 0
        names = input_names([i.name for i in graph.model.graph.input])
        for name, valid in names.items():
            self.values[name] = node = self.torch_graph.placeholder(valid)
            kind = graph.kinds.get(name, Kind())
            if kind.dims is not None and kind.dtype in DTYPES:
                sizes = dict(enumerate(example[name].shape)) if name in example else {}
                probe_input(node, kind.dims, DTYPES[kind.dtype], sizes)

    def run(self, nodes: Sequence[Any]) -> None:
        """Convert nodes in their order."""
        for node in nodes:
            if node.output[0] in self.done:
                continue
            if node.op_type == "If":
                self._branch(node)
                continue
            try:
                values = self._convert(node)
            except ModelError:
                raise
            except Exception as error:  # attributes of another length than the inputs' number of dimensions, and such
                raise ModelError(
                    f"{node_label(node)}: its attributes do not fit its inputs: {first_line(error)}"
                ) from error
            for name, value in zip(node.output, values):
                if name:
                    self.values[name] = value

    def _convert(self, node: Any) -> Sequence[Any]:
        module = self.graph.modules.get(node.output[0])
        if module is not None:
            value = self._tensor(node.input[0])
            return [self._call_module(module, module_name(node, not isinstance(module, FakeQuantize)), (value,))]
        inputs = [self._value(n, node) if n else None for n in node.input]
        while inputs and inputs[-1] is None:
            inputs.pop()
        sizes = self._sizes(node, inputs)
        if sizes is not None:
            known = sizes.known()
            return [sizes if known is None else known]
        known = all(i is None or isinstance(i, Tensor) for i in inputs)
        if known and not is_lookup(node, self.stored, self.values):
            results = evaluate(node, inputs, self.graph.opset)
            if results is not None:
                return results
        if node.op_type == "Identity" or (node.op_type == "Dropout" and len(inputs) == len(node.output) == 1):
            return [self._tensor(node.input[0], inputs[0])]
        layer = self._layer(node, inputs)
        return [layer] if layer is not None and len(node.output) == 1 else self._unpack(node, layer, inputs)

    def _value(self, name: str, node: Any) -> Any:
        if name not in self.values:
            raise ModelError(f"{node_label(node)} reads {name!r}, which nothing before it computes")
        return self.values[name]

    def _unpack(self, node: Any, result: fx.Node | None, inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs of a call that returns several."""
        result = self._function(node, inputs) if result is None else result
        if len(node.output) == 1:
            return [result]
        return [self._emit(operator.getitem, result, i) if n else None for i, n in enumerate(node.output)]

    # Sizes

    def _sizes(self, node: Any, inputs: Sequence[Any]) -> Sizes | None:
        """Return what an operator computes from sizes, if it is sizes again."""
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type in ("Shape", "Size"):
            return self._shape(node, inputs[0])
        if not any(isinstance(i, Sizes) for i in inputs):
            return None
        return self.rules.compute(node.op_type, [as_sizes(i) for i in inputs], attributes_of(node))

    def _shape(self, node: Any, value: Any) -> Sizes | None:
        """Return the sizes of a tensor whose number of dimensions is known."""
        if isinstance(value, Sizes):
            dims: Any = () if value.scalar else (len(value.items),)
        elif isinstance(value, Tensor):
            dims = tuple(value.shape)
        else:
            dims = self.graph.kinds.get(node.input[0], Kind()).dims
            rank = rank_of(value)
            dims = (None,) * rank if dims is None and rank is not None else dims
        if dims is None:
            return None
        items = [self.rules.size(value, d) if n is None else n for d, n in enumerate(dims)]
        if node.op_type == "Shape":
            values = attributes_of(node)
            return Sizes(tuple(items[values.get("start", 0) : values.get("end")]))
        total: Any = 1
        for item in items:
            total = self.rules.apply(operator.mul, total, item)
        return Sizes((total,), True)

    def _emit_size(self, function: Any, *arguments: Any) -> fx.Node:
        return self._call("call_method" if function == "size" else "call_function", function, arguments)

    def _emit(self, function: Any, *arguments: Any) -> fx.Node:
        return self._call("call_function", function, arguments)

    def _call(
        self, op: str, target: Any, arguments: tuple[Any, ...], named: Any = None, name: str | None = None,
        module: nn.Module | None = None,
    ) -> fx.Node:  # fmt: skip
        """Add a call to the torch graph."""
        node = self.torch_graph.create_node(op, target, arguments, named or {}, name=name)
        probe_call(node, module)
        return node

    # Values as arguments

    def _tensor(self, name: str, value: Any = None) -> Any:
        """Return the node of a value as a tensor."""
        value = self.values[name] if value is None else value
        if isinstance(value, Sizes):
            items = value.items[0] if value.scalar else list(value.items)
            key = (value.items, value.scalar, value.dtype)
            if key not in self.as_tensors:
                node = self._emit(sizes_to_tensor, items)
                self.as_tensors[key] = (
                    node if value.dtype in _plain(value) else self._emit(torch.Tensor.to, node, value.dtype)
                )
            return self.as_tensors[key]
        if isinstance(value, Tensor):
            if name not in self.held:
                self.held[name] = self.torch_graph.get_attr("")
                probe_constant(self.held[name], value)
            return self.held[name]
        return value

    def _tuple(self, name: str, value: Any) -> Any:
        """Return a value as a tuple of numbers, some of them nodes perhaps."""
        if isinstance(value, Tensor):
            return tuple(value.reshape(-1).tolist())
        return value.items if isinstance(value, Sizes) else self._emit(to_ints, value)

    def _number(self, name: str, value: Any, rank: int | None) -> Any:
        """Return a value as a number if it is one and cannot change the shape of the result, else as a tensor."""
        if isinstance(value, Sizes) and value.scalar:
            return value.items[0]
        if isinstance(value, Tensor) and value.numel() == 1 and (value.dim() == 0 or value.dim() <= (rank or 0)):
            return value.item()
        return self._tensor(name, value)

    # Calls

    def _function(self, node: Any, inputs: Sequence[Any]) -> fx.Node:
        """Add a call of an operator's function; return its node."""
        if (on_elements := self._on_elements(node, inputs)) is not None:
            return on_elements
        function = function_of(node)
        if function is None:
            raise ModelError(f"operators without a torch module: {operator_name(node)} (1)")
        if (index := _constant_index(node, inputs)) is not None:
            return self._emit(
                torch.select, self._tensor(node.input[0], inputs[0]), attributes_of(node).get("axis", 0), index
            )
        signature, constants = signature_of(function), options(node, function, self.graph.opset)
        check_count(node, signature, len(inputs), constants)
        if node.op_type == "Reshape" and "allowzero" not in constants and isinstance(inputs[1], Tensor | Sizes):
            return self._reshape(node, inputs)
        arguments: list[Any] = []
        named: dict[str, Any] = {}
        rank = self._rank(node.input[0])
        for i, (name, value) in enumerate(zip(node.input, inputs)):
            parameter = signature.inputs[i] if i < len(signature.inputs) else ""
            if value is None:
                argument: Any = None
            elif parameter in signature.tuples:
                argument = self._tuple(name, value)
            elif parameter in signature.numbers:
                argument = self._number(name, value, rank)
            else:
                argument = self._tensor(name, value)
            if parameter and _is_constant(argument):
                constants[parameter] = argument
            elif parameter and len(arguments) < i:
                named[parameter] = argument
            else:
                arguments.append(argument)
        constants = {n: v for n, v in constants.items() if v is not None}
        if not _holds_constants(constants) and not isinstance(function, partial):
            return self._call("call_function", function, tuple(arguments), {**constants, **named})
        module = Operator(node.op_type, function, constants)
        call = self._call_module(module, module_name(node, False), tuple(arguments), named)
        if node.op_type == "Slice":
            part = slice_of(node.input[0], self.graph.kinds.get(node.input[0], Kind()), constants, call)
            if part is not None:
                self.slices.append(part)
        return call

    def _on_elements(self, node: Any, inputs: Sequence[Any]) -> fx.Node | None:
        """Add a call of Python's operator, for those that torch's tensors have; numbers stay numbers."""
        function = ON_ELEMENTS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        dtype = dtype_of_probe(inputs[0]) or DTYPES.get(self.graph.kinds.get(node.input[0], Kind()).dtype)
        if node.op_type == "Div" and dtype is not None and dtype.is_floating_point:
            function = operator.truediv
        if function is None or dtype is None or dtype in WIDE_UNSIGNED or len(inputs) != 2 or node.attribute:
            return None
        nodes = [i for i, v in enumerate(inputs) if isinstance(v, fx.Node)]
        if not nodes:
            return None
        rank = self._rank(node.input[nodes[0]])
        arguments = [self._number(n, v, rank) if not isinstance(v, fx.Node) else v for n, v in zip(node.input, inputs)]
        return self._emit(function, *arguments)

    def _rank(self, name: str) -> int | None:
        dims = self.graph.kinds.get(name, Kind()).dims
        return rank_of(self.values.get(name)) if dims is None else len(dims)

    def _reshape(self, node: Any, inputs: Sequence[Any]) -> fx.Node:
        """Add a reshape whose known sizes are constants; at most one open size is left out."""
        x, sizes = self._tensor(node.input[0], inputs[0]), as_sizes(inputs[1])
        assert sizes is not None
        shape: list[int | None] = []
        for d, item in enumerate(sizes.items):
            same = isinstance(item, fx.Node) and item.target == "size" and item.args == (x, d)
            shape.append(0 if same else None if isinstance(item, fx.Node) else int(item))
        open_sizes = [i for i, n in zip(sizes.items, shape) if n is None]
        if len(open_sizes) == 1 and -1 not in shape:
            shape[shape.index(None)], open_sizes = -1, []
        return self._call_module(Reshape(tuple(shape)), module_name(node, False), (x, *open_sizes))

    def _call_module(
        self, module: nn.Module, name: str, arguments: tuple[Any, ...], named: dict[str, Any] | None = None
    ) -> fx.Node:
        target = f"call_{len(self.modules)}"
        node = self._call("call_module", target, arguments, named, name.replace(".", "_").replace("-", "_"), module)
        self.modules.append((node, name, module))
        return node

    # Layers

    def _layer(self, node: Any, inputs: Sequence[Any]) -> fx.Node | None:
        """Add a call of a torch layer, if the operator can be one; return its node."""
        build = LAYERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if build is None:
            return None
        site = Site(
            [i if isinstance(i, Tensor) else None for i in inputs],
            [i is not None for i in inputs],
            attributes_of(node),
            self._rank(node.input[0]),
            self.graph.opset,
            len(node.output),
        )
        layer = build(site)
        if layer is None:
            return None
        module, name = layer.module, module_name(node, True)
        arguments = [self._tensor(node.input[i], inputs[i]) for i in layer.inputs]
        if layer.before is not None:
            arguments[0] = self._call_module(layer.before, f"{name}_pad", (arguments[0],))
        call = self._call_module(module, name, tuple(arguments))
        add = self._bias(node, module)
        if layer.weight >= 0:
            self._quantize(node, layer)
        if add is not None:
            self.done.add(add.output[0])
            self.values[add.output[0]] = call
        return call

    def _bias(self, node: Any, layer: nn.Module) -> Any:
        """Make a constant that an Add alone adds to a layer's outputs its bias; return that Add, else None."""
        users = self.users.get(node.output[0], [])
        alone = len(users) == 1 and users[0].op_type == "Add" and node.output[0] not in self.graph.outputs
        if not alone or not isinstance(layer, QUANTIZED_LAYERS) or layer.bias is not None:
            return None
        arrays = [v for n in users[0].input if isinstance(v := self.values.get(n), Tensor)]
        spatial = layer.weight.dim() - 2
        count = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        shapes = [(count, *[1] * spatial), (1, count, *[1] * spatial)][: 1 + (spatial > 0)]
        if len(arrays) != 1 or tuple(arrays[0].shape) not in shapes:
            return None
        layer.bias = nn.Parameter(arrays[0].reshape(-1).clone().to(layer.weight.dtype))
        return users[0]

    def _quantize(self, node: Any, layer: Layer) -> None:
        """Share the weights of one constant, and note its grid and how the layer's inputs are quantized."""
        module: Any = layer.module
        name = node.input[layer.weight]
        inputs = self.graph.quantized.get(node.input[0])
        if inputs is not None and inputs.bits == 8 and isinstance(module, QUANTIZED_LAYERS):
            set_activation_quant_(module, inputs)
        same = [p for p in self.weights.setdefault(name, []) if torch.equal(p, module.weight)]
        if same:
            module.weight = same[0]
        else:
            self.weights[name].append(module.weight)
        grid = self.graph.grids.get(name)
        if grid is not None and not layer.scaled and isinstance(module, (*QUANTIZED_LAYERS, nn.Embedding)):
            record_grid_(module, "weight", grid.map(lambda t: t.T.contiguous()) if layer.transposed else grid)

    # Control flow

    def _branch(self, node: Any) -> None:
        """Convert the branch of an If that its condition chooses; it must be known."""
        condition = self._value(node.input[0], node)
        if isinstance(condition, Sizes):
            condition = condition.known()
        if not isinstance(condition, Tensor) or condition.numel() != 1:
            raise ModelError(
                f"{node_label(node)}: an If whose condition depends on the inputs is not supported; if it depends on "
                "their shapes alone, give shapes="
            )
        if self.depth >= MAX_DEPTH:
            raise ModelError(f"{node_label(node)}: If within If more than {MAX_DEPTH} times")
        wanted = "then_branch" if bool(condition) else "else_branch"
        branch = next((a.g for a in node.attribute if a.name == wanted), None)
        if branch is None:
            raise ModelError(f"{node_label(node)}: an If without a {wanted}")
        constants, nodes = constants_of(branch)
        self.values.update({n: to_tensor(a) for n, a in constants.items()})
        self.stored |= {i.name for i in branch.initializer}
        self.depth += 1
        self.run(nodes)
        self.depth -= 1
        for name, value in zip(node.output, branch.output):
            self.values[name] = self._value(value.name, node)

    # The end

    def finish(self) -> fx.GraphModule:
        """Add the outputs, drop what they do not need, and name the modules and constants."""
        outputs = [self._tensor(name) for name in self.graph.outputs if name in self.values]
        if len(outputs) != len(self.graph.outputs):
            raise ModelError("an output of the graph is computed by no node")
        self.torch_graph.output(outputs[0] if len(outputs) == 1 else outputs)
        self._remove_fake_quantize()
        merge_slices_(self.torch_graph, self.slices)
        for node in reversed(self.torch_graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.torch_graph.erase_node(node)
        root, alive = nn.Module(), set(self.torch_graph.nodes)
        self.modules = [m for m in self.modules if m[0] in alive]
        for node, name, module in sorted(self.modules, key=lambda m: not isinstance(m[2], FIRST_NAMED)):
            node.target = place(root, name, module)
        for name, node in self.held.items():
            if node in alive:
                value = self.values[name]
                trains = name in self.stored and value.is_floating_point() and value.numel() > 1
                node.target = place(root, _constant_name(name), nn.Parameter(value) if trains else value)
        module = fx.GraphModule(root, self.torch_graph, "OnnxModel")
        return module

    def _remove_fake_quantize(self) -> None:
        """Remove fake quantization before layers that quantize their inputs in the same way."""
        modules = {node: module for node, _, module in self.modules}
        for node, _, module in self.modules:
            if not isinstance(module, FakeQuantize):
                continue
            for user in list(node.users):
                quant = get_activation_quant(modules[user]) if user in modules else None
                if quant is not None and quant == module.inputs:
                    user.replace_input_with(node, node.all_input_nodes[0])


def _constant_index(node: Any, inputs: Sequence[Any]) -> int | None:
    """Return the index of a Gather that takes one slice, where it is known; None for everything else."""
    if node.op_type != "Gather" or node.domain not in ("", "ai.onnx") or len(inputs) != 2:
        return None
    index = inputs[1].known() if isinstance(inputs[1], Sizes) else inputs[1]
    return int(index) if isinstance(index, Tensor) and index.dim() == 0 and isinstance(inputs[0], fx.Node) else None


def _constant_name(name: str) -> str:
    """Return the dotted name of a constant, which must begin with a letter."""
    dotted = join(name.replace("/", ".").replace("::", "_").split("."))
    return dotted if dotted[:1].isalpha() else f"constant_{dotted}"


def _plain(sizes: Sizes) -> tuple[torch.dtype, ...]:
    """Return the types that sizes have as a tensor without a conversion."""
    kinds = {type(i) for i in sizes.items if not isinstance(i, fx.Node)}
    return () if kinds & {bool, float} else (torch.int64,)


def _is_constant(argument: Any) -> bool:
    """Return whether an argument is a number or a tuple of known numbers."""
    if isinstance(argument, tuple):
        return not any(isinstance(i, fx.Node) for i in argument)
    return isinstance(argument, int | float | bool)


def _holds_constants(constants: dict[str, Any]) -> bool:
    """Return whether there are constants beside those that every call has."""
    return bool(set(constants) - {"opset", "outputs"})
