"""Models of .pt2 files, which `torch.export.save` writes, as torch modules."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from rarefy.checkpoint.pt2_archive import DTYPES, Archive, read
from rarefy.checkpoint.pt2_graph import MAX_NODES, Nodes, add_call, argument, fuse_rounding, plain_name
from rarefy.checkpoint.pt2_layers import Layers
from rarefy.common.errors import ContainerError, DataError, ModelError, RarefyError, first_line
from rarefy.compiler.input_checks import InputSpec, readable_guards
from rarefy.compiler.shape_guards import MAX_SIZE, parse
from rarefy.model.forward import describe_batch
from rarefy.model.signature import ModelInput, Signature, set_signature_
from rarefy.onnx.signature import parameters_of

CLASS = "ExportedModel"
WEIGHT_KINDS = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
SYMBOL = re.compile(r"(?:Symbol\(')?([a-z]{1,4}[0-9]{1,9})(?:',[^()]*\))?")
MAX_DEPTH = 16  # levels of nested outputs
DAMAGES = (  # what reading a damaged program raises: of Python, of torch's layers, and of code that fx generates
    LookupError, TypeError, ValueError, AttributeError, StopIteration, RuntimeError, ArithmeticError,
    AssertionError, SyntaxError,
)  # fmt: skip
OUTPUTS = ("as_int", "as_float", "as_bool", "as_string", "as_none")  # beside tensors
GUARD_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[([0-9]{1,2})\]")  # the size of an input, as torch's guards write it
CHECK = "rarefy_input_sizes"  # the name of the module that checks inputs


class InputSizes(nn.Module):
    """Raises DataError for inputs whose sizes are not those that the program was exported for.

    A model that is compiled from the module keeps these conditions: torch.export traces them, too.
    """

    _is_impure = True  # stays in the graph, although nothing reads its output

    def __init__(self, inputs: Sequence[ModelInput], ranges: Mapping[str, tuple[int, int]], guards: Sequence[str]):
        """Keep the conditions.

        Args:
            inputs: the inputs, their open sizes by name.
            ranges: the smallest and largest value of open sizes.
            guards: conditions on sizes, see `compiler/shape_guards.py`: i0_1 is dimension 1 of the first input.
        """
        super().__init__()
        self.inputs, self.ranges, self.guards = tuple(inputs), dict(ranges), [parse(g) for g in guards]
        places = [tuple(f"i{i}_{d}" for d in range(len(each.dims or ()))) for i, each in enumerate(inputs)]
        self.texts = readable_guards(guards, [(i.name, InputSpec(i.dtype, p)) for i, p in zip(inputs, places)])

    def forward(self, *tensors: Tensor) -> None:
        """Check the inputs."""
        known: dict[str, Any] = {}
        for described, t in zip(self.inputs, tensors):
            if not isinstance(t, Tensor):
                raise DataError(f"expected the input {described}, got {type(t).__name__}: pass a torch tensor")
            dims = described.dims or ()
            sizes = [known.setdefault(d, n) if isinstance(d, str) and d else d for d, n in zip(dims, t.shape)]
            if len(dims) != t.dim() or any(d != n for d, n in zip(sizes, t.shape) if d != ""):
                raise DataError(
                    f"expected the input {described}, got {describe_batch(t)}: sizes with a name are open, the others "
                    "were fixed when the model was exported (torch.export's dynamic_shapes= leaves more open)"
                )
        for name, (lowest, highest) in self.ranges.items():
            if name in known and not lowest <= known[name] <= highest:
                limits = f"{lowest} or more" if highest == MAX_SIZE else f"{lowest} to {highest}"
                raise DataError(f"the program was exported for {name} of {limits}, got {known[name]}")
        places = {f"i{i}_{d}": n for i, t in enumerate(tensors) for d, n in enumerate(t.shape)}
        for guard, text in zip(self.guards, self.texts):
            if not guard.holds(places):
                raise DataError(
                    f"the program was exported for sizes with {text}, got {describe_batch(tensors)}: at other sizes "
                    "the model may take another branch; export it with an example of these sizes"
                )


def is_file(source: Any) -> bool:
    """Return whether a model is named by the path of a .pt2 file."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() == ".pt2" and Path(source).is_file()


def load_pt2(path: str | Path) -> nn.Module:
    """Return the model of a .pt2 file as a module in evaluation mode, without unpickling or evaluating any of it.

    The module takes the tensors of the program's inputs, in their order or by name, and returns what the program does;
    outputs that were of a class become a dict. Linear layers, convolutions, embeddings and norms become torch's, with
    their names, so they can be pruned, quantized and trained. Example inputs of the file are not read. Sizes at
    which the program may take another branch are refused.

    Args:
        path: the file.

    Raises:
        ContainerError: there is no such file, it is damaged, or parts of it are pickles or compiled code.
        ModelError: the program calls an operator that is not supported, takes nested inputs, changes its buffers, or
            was not exported in evaluation mode on the CPU.

    Cost: O(weights).
    """
    archive = read(path)
    try:
        return _module(archive)
    except RarefyError as error:
        raise type(error)(f"{archive.path}: {error}") from None
    except DAMAGES as error:
        raise ContainerError(f"{archive.path} is damaged: {first_line(error)}") from None


def _module(archive: Archive) -> nn.Module:
    program = archive.program["graph_module"]
    described, signature = program["graph"], program["signature"]
    root = next(e["signature"] for e in program["module_call_graph"] if e["fqn"] == "")
    if len(described["nodes"]) > MAX_NODES:
        raise ModelError(f"the program has {len(described['nodes']):,} nodes, at most {MAX_NODES:,} are read")
    _check_outputs(signature["output_specs"])
    weights, inputs = _split_inputs(signature["input_specs"], archive.tensors)
    names = _parameter_names(json.loads(root["in_spec"])[1], inputs)
    module, graph = nn.Module(), fx.Graph()
    nodes = Nodes(graph, {n: len(meta["sizes"]) for n, meta in described["tensor_values"].items()})
    for placeholder, name in zip(inputs, names):
        if placeholder is not None:
            nodes.add(placeholder, graph.placeholder(plain_name(name)))
    listed = [_input(p, n, described["tensor_values"][p]) for p, n in zip(inputs, names) if p is not None]
    hints = {p: described["tensor_values"][p]["sizes"] for p in inputs if p is not None}
    guards = _guards(archive.program.get("guards_code") or [], hints)
    module.add_module(CHECK, InputSizes(listed, _ranges(archive.program.get("range_constraints")), guards))
    graph.call_module(CHECK, tuple(nodes.by_name.values()))
    layers = Layers(module, graph, weights)
    for placeholder, target in weights.items():
        _check_dtype(target, archive.tensors[target], described["tensor_values"].get(placeholder))
        nodes.add(placeholder, layers.add_weight(placeholder, target, archive.tensors[target]))
    for call in described["nodes"]:
        add_call(nodes, call, layers.call)
    leaves = [_output(o, nodes) for o in described["outputs"]]
    graph.output(_nested(json.loads(root["out_spec"])[1], iter(leaves)))
    fuse_rounding(graph)
    graph.lint()
    result = fx.GraphModule(module, graph, CLASS).eval()
    result.graph.eliminate_dead_code()
    result.recompile()
    outputs = tuple(o["as_tensor"]["name"] for o in described["outputs"] if "as_tensor" in o)
    set_signature_(result, parameters_of(result, Signature(tuple(listed), outputs)))
    return result


def _check_dtype(name: str, weight: Tensor, meta: Mapping[str, Any] | None) -> None:
    """Raise ContainerError for a weight of another type than the graph says, whose first call would fail."""
    dtype = weight.dtype if meta is None else DTYPES.get(meta["dtype"])
    if dtype != weight.dtype:
        types = [str(d).removeprefix("torch.") for d in (dtype, weight.dtype)]
        raise ContainerError(f"the tensor {name[:200]!r}: the graph expects {types[0]}, the file stores {types[1]}")


def _check_outputs(specs: Any) -> None:
    """Raise ModelError for a program that returns more than its outputs."""
    other = next((kind for spec in specs for kind in spec if kind != "user_output"), None)
    if other is not None:
        raise ModelError(f"the program has a {str(other)[:40].replace('_', ' ')}: it must only return outputs")


def _output(value: Mapping[str, Any], nodes: Nodes) -> Any:
    """Return the node of an output, or a constant; ModelError for what depends on the inputs and is no tensor."""
    ((kind, _),) = value.items()
    if kind != "as_tensor" and kind not in OUTPUTS:
        raise ModelError("the program returns a number that depends on its inputs: it must return tensors or constants")
    return argument(value, nodes)


def _ranges(constraints: Any) -> dict[str, tuple[int, int]]:
    """Return the smallest and largest values of open sizes by name; names that are expressions count as none.

    torch writes 2 for the smallest where it knows nothing: it takes all open sizes to be 2 or more while it traces.
    """
    items = constraints.items() if isinstance(constraints, Mapping) else ()
    ranges: dict[str, tuple[int, int]] = {}
    for name, r in items:
        if isinstance(r, Mapping) and SYMBOL.fullmatch(name):
            lowest, highest = r.get("min_val"), r.get("max_val")
            lowest = lowest if type(lowest) is int and lowest > 2 else 1
            ranges[name] = lowest, highest if type(highest) is int else MAX_SIZE
    return ranges


def _guards(codes: Any, sizes: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the guards of a program in the grammar of `compiler/shape_guards.py`.

    Sizes in a guard that the grammar cannot express are fixed to those that the program was exported with.

    Args:
        codes: torch's guards, as text: "L['x'].size()[1] % 4 == 0".
        sizes: what the file says of the sizes of each input, by its placeholder.

    Raises:
        ModelError: a guard reads something else than sizes of inputs.
    """
    if type(codes) is not list or len(codes) > MAX_NODES or not all(type(c) is str for c in codes):
        raise ValueError("guards_code: expected a list of conditions")
    index = {name: i for i, name in enumerate(sizes)}
    guards: list[str] = []
    for code in codes:
        places = [(name, int(d)) for name, d in GUARD_SIZE.findall(code)]
        if "L[" in GUARD_SIZE.sub("", code) or any(n not in index or d >= len(sizes[n]) for n, d in places):
            raise ModelError(f"the program has a condition on its inputs that cannot be checked: {code[:200]}")
        try:
            text = GUARD_SIZE.sub(lambda m: f"i{index[m[1]]}_{m[2]}", code)
            guards += [text] if parse(text).names else []
        except ValueError:
            guards += [f"i{index[n]}_{d} == {_traced_size(sizes[n][d], code)}" for n, d in places]
    return list(dict.fromkeys(guards))


def _traced_size(size: Mapping[str, Any], code: str) -> int:
    """Return the size with which a program was exported; ModelError where the file does not say it."""
    n = size.get("as_int", (size.get("as_expr", {}).get("hint") or {}).get("as_int"))
    if type(n) is not int:
        raise ModelError(f"the program has a condition on sizes that cannot be checked: {code[:200]}")
    return n


def _split_inputs(specs: Any, tensors: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str | None]]:
    """Return the names of weights by placeholder, and the placeholders of inputs, None for those that are constant."""
    weights: dict[str, str] = {}
    inputs: list[str | None] = []
    for spec in specs:
        ((kind, content),) = spec.items()
        if kind in WEIGHT_KINDS:
            name = content[WEIGHT_KINDS[kind]]
            if name not in tensors:
                raise ContainerError(f"the tensor {str(name)[:200]!r} is missing")
            weights[plain_name(content["arg"]["name"])] = name
        elif kind == "constant_input":
            inputs.append(None)
        elif kind == "user_input" and "as_tensor" in content["arg"]:
            inputs.append(plain_name(content["arg"]["as_tensor"]["name"]))
        else:
            raise ModelError(f"the program takes a {str(kind)[:40].replace('_', ' ')} that is no tensor")
    if not any(inputs):
        raise ModelError("the program takes no tensor")
    return weights, inputs


def _parameter_names(in_spec: Mapping[str, Any], inputs: list[str | None]) -> list[str | None]:
    """Return the name of each input in the signature: by position that of its placeholder, else its keyword."""
    args, kwargs = in_spec["children_spec"]
    children = [*args["children_spec"], *kwargs["children_spec"]]
    if any(c["type"] is not None for c in children):
        raise ModelError("the program takes nested inputs: export it with tensors as arguments, not lists or dicts")
    if len(children) != len(inputs):
        raise ContainerError(f"{len(inputs)} inputs do not fit {len(children)} arguments")
    count = len(args["children_spec"])
    return [*inputs[:count], *json.loads(kwargs["context"])]


def _input(placeholder: str, name: str | None, meta: Mapping[str, Any]) -> ModelInput:
    """Return the description of an input."""
    dims = tuple(n["as_int"] if "as_int" in n else _symbol(n["as_expr"]["expr_str"]) for n in meta["sizes"])
    if not all(isinstance(d, str) or (type(d) is int and d >= 0) for d in dims):
        raise ValueError(f"the sizes of {placeholder} are no whole numbers")
    return ModelInput(str(name), str(name), DTYPES[meta["dtype"]], dims)


def _symbol(text: str) -> str:
    """Return the name of an open size, "" for an expression.

    >>> _symbol("Symbol('s23', positive=True, integer=True)"), _symbol("s4"), _symbol("2*s4")
    ('s23', 's4', '')
    """
    match = SYMBOL.fullmatch(text)
    return match[1] if match else ""


def _nested(spec: Mapping[str, Any], leaves: Any, depth: int = 0) -> Any:
    """Return outputs nested as a spec says: lists, tuples and dicts; a class with named fields becomes a dict."""
    if depth > MAX_DEPTH:
        raise ValueError("outputs are nested too deeply")
    if spec["type"] is None:
        return next(leaves)
    children = [_nested(c, leaves, depth + 1) for c in spec["children_spec"]]
    if spec["type"] == "builtins.list":
        return children
    keys = json.loads(spec["context"]) if spec["type"] != "builtins.tuple" and spec["context"] else None
    if isinstance(keys, list) and len(keys) == len(children) and all(isinstance(k, str) for k in keys):
        return dict(zip(keys, children))
    return tuple(children)
