"""Types and shapes of the values of an ONNX file, by ONNX's own inference.

The inference follows the elements of vectors that may be shapes one by one, so that a file of some hundred bytes with a
vector of four billion elements would fill the memory. So first it runs without these elements, which tells how long
vectors are; where that depends on them, the operators that make such vectors are asked with nothing after them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rarefy.common.errors import ModelError
from rarefy.onnx.graph import Kind
from rarefy.onnx.runtime_operators import add_shapes_

MAX_ELEMENTS = 1 << 27  # of one value whose shape is known
MAX_VECTOR = 1 << 20  # integers of a vector whose elements are followed
MAX_INFERRED = 200_000  # operators whose shapes are inferred, in all repetitions
MAX_SMALL = 1024  # elements of a constant that shape inference may read
MAX_ROUNDS = 8  # of vectors whose length depends on the elements of others
SIZED_BY_VALUES = frozenset(  # operators whose output may be longer than all inputs: its sizes are values or attributes
    (
        *("ConstantOfShape", "Expand", "Range", "Reshape", "Resize", "Tile", "Upsample", "Pad", "OneHot", "TopK"),
        *("RandomNormal", "RandomUniform", "MaxUnpool", "Col2Im", "CenterCropPad", "Split", "SplitToSequence"),
        *("HannWindow", "HammingWindow", "BlackmanWindow", "DFT", "STFT", "AffineGrid", "GridSample", "RoiAlign"),
    )
)
INTEGERS = (0, 6, 7)  # TensorProto's int32 and int64, and types that are not known


def infer_kinds(model: Any) -> dict[str, Kind]:
    """Return the types and shapes of all values that ONNX's shape inference finds, or that the file tells.

    Raises:
        ModelError: a value has too many elements.
    """
    light, declared = without_weights(model), kinds_of(model.graph.value_info)
    for value in light.graph.output:
        value.type.tensor_type.ClearField("shape")
    del light.graph.value_info[:]
    check_sizes(kinds_of(light.graph.input))
    if _has_old_expand(light, [n for f in light.functions for n in f.node]):
        return declared  # they are replaced by their nodes later
    try:
        for _ in range(1 + MAX_INFERRED // len(light.graph.node)):
            follow = _vectors_are_short(light)
            if not follow and _has_old_expand(light, light.graph.node):
                return declared
            values = _infer(light, follow)
            if not add_shapes_(light.graph, {v.name: v for v in values if v.type.tensor_type.HasField("shape")}):
                break
    except ModelError:
        raise
    except Exception:  # an operator with inputs that do not fit; the converter names it
        return declared
    inferred = kinds_of(values)
    return {**declared, **{n: k for n, k in inferred.items() if k.dims is not None or n not in declared}}


def check_sizes(kinds: Mapping[str, Kind]) -> None:
    """Raise ModelError for values of too many elements."""
    for name, kind in kinds.items():
        count = math.prod(n for n in kind.dims or () if n is not None)
        if count > MAX_ELEMENTS:
            raise ModelError(f"{name} has {count:,} elements; at most {MAX_ELEMENTS:,} are read")


def kinds_of(values: Iterable[Any]) -> dict[str, Kind]:
    """Return the types and shapes of values by their names."""
    kinds = {}
    for value in values:
        tensor = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None for d in tensor.shape.dim]
        kinds[value.name] = Kind(tensor.elem_type, tuple(dims) if tensor.HasField("shape") else None)
    return kinds


def _infer(light: Any, follow: bool) -> list[Any]:
    """Return what ONNX infers of all values; `follow`: also from the elements of vectors that may be shapes."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(light, data_prop=follow).graph
    return [*graph.input, *graph.value_info, *graph.output]


def _vectors_are_short(light: Any) -> bool:
    """Return whether no operator makes a long vector, nor one that may be long; ModelError for values of too
    many elements. Only then may the elements of vectors be followed."""
    makers = [n for n in light.graph.node if _is_sized_by_values(n)]
    if not makers and not light.functions:
        return not _has_long_vector(kinds_of(light.graph.input))
    first = kinds_of(_infer(_cut(light, makers if _has_old_expand(light, light.graph.node) else []), follow=False))
    known = {n.removesuffix(CUT): k for n, k in first.items()}
    check_sizes(known)
    if any(map(_subgraphs, makers)) or any(_is_sized_by_values(n) for f in light.functions for n in f.node):
        return False
    for _ in range(MAX_ROUNDS):
        if _has_long_vector(known):
            return False
        unknown = [n for n in makers if any(_may_be_long(known.get(o, Kind())) for o in n.output)]
        if not unknown:
            return True
        inferred = kinds_of(_infer(_cut(light, unknown), follow=True))
        learned = {o: inferred[f"{o}{CUT}"] for n in unknown for o in n.output if f"{o}{CUT}" in inferred}
        check_sizes(learned)
        learned = {o: k for o, k in learned.items() if k.dims is not None and k != known.get(o)}
        if not learned:  # nothing that follows can tell more about them
            return True
        known |= learned
    return False


def _has_old_expand(light: Any, nodes: Iterable[Any]) -> bool:
    """Return whether one of the nodes is an Expand of a version that always follows the elements of its shape."""
    opset = min((o.version for o in light.opset_import if o.domain in ("", "ai.onnx")), default=0)
    return opset < 13 and any(
        n.op_type == "Expand" or any(_has_old_expand(light, g.node) for g in _subgraphs(n)) for n in nodes
    )


CUT = "/rarefy_cut"  # behind the name of an output that is computed, and that nothing reads


def _cut(light: Any, makers: list[Any]) -> Any:
    """Return a copy of a model in which others read inputs of unknown type instead of the outputs of some nodes."""
    copy = type(light).FromString(light.SerializeToString())
    outputs = {o for n in makers for o in n.output if o}
    for node in copy.graph.node:
        for i, name in enumerate(node.output):
            if name in outputs:
                node.output[i] = f"{name}{CUT}"
    outputs_left = [o for o in copy.graph.output if o.name not in outputs]
    del copy.graph.output[:]
    copy.graph.output.extend(outputs_left)
    for name in sorted(outputs):
        copy.graph.input.add(name=name)
    return copy


def _is_vector(kind: Kind) -> bool:
    """Return whether a value may be a vector of integers."""
    return kind.dtype in INTEGERS and (kind.dims is None or len(kind.dims) == 1)


def _has_long_vector(kinds: Mapping[str, Kind]) -> bool:
    return any(_is_vector(k) and (k.dims[0] or 0) > MAX_VECTOR for k in kinds.values() if k.dims)


def _may_be_long(kind: Kind) -> bool:
    return _is_vector(kind) and kind.dims in (None, (None,))


def _subgraphs(node: Any) -> list[Any]:
    return [g for a in node.attribute for g in (a.g, *a.graphs) if g.node]


def _is_sized_by_values(node: Any) -> bool:
    """Return whether an operator, or one in its subgraphs, can make a vector that is longer than all inputs."""
    inner = any(_is_sized_by_values(n) for g in _subgraphs(node) for n in g.node)
    return inner or node.op_type in SIZED_BY_VALUES


def without_weights(model: Any) -> Any:
    """Return a copy of a model whose large constants are inputs: for passes that need their shapes alone."""
    import onnx

    graph = onnx.GraphProto(name=model.graph.name, node=model.graph.node, output=model.graph.output)
    graph.value_info.extend(model.graph.value_info)
    held = {i.name for i in model.graph.initializer}
    graph.input.extend(i for i in model.graph.input if i.name not in held)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= MAX_SMALL:
            graph.initializer.add().CopyFrom(tensor)
        else:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    light = onnx.ModelProto(ir_version=model.ir_version, graph=graph)
    light.opset_import.extend(model.opset_import)
    light.functions.extend(model.functions)
    return light
