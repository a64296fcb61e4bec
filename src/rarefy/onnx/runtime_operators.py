"""Fused operators that ONNX Runtime writes into files it optimized, as the operators of ONNX that they were made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rarefy.common.errors import ModelError
from rarefy.onnx.binding import attributes_of, node_label

RUNTIME = "com.microsoft"
FUSED = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
OWN = {"activation", "activation_params", "activation_alpha", "activation_beta", "activation_gamma"}
NORMS = {"LayerNormalization": 17, "SimplifiedLayerNormalization": 1 << 30}  # opset from which ONNX has them itself
ACTIVATIONS: dict[str, tuple[str, ...]] = {  # and the attributes that their numbers are
    "Relu": (), "Tanh": (), "Sigmoid": (), "LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"), "Clip": (),
}  # fmt: skip
LIKE_INPUT = (  # operators whose first output is shaped like their first input
    "BiasGelu", "FastGelu", "Gelu", "QuickGelu", "SkipLayerNormalization", "LayerNormalization",
    "SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "MultiHeadAttention", "RotaryEmbedding",
)  # fmt: skip


def split_fused_(model: Any) -> None:
    """Split convolutions and products with an activation, and give norms of older opsets the domain that has them.

    Raises:
        ModelError: for an activation that is not known.
    """
    from onnx import helper

    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    nodes: list[Any] = []
    for node in model.graph.node:
        if node.domain in ("", "ai.onnx") and NORMS.get(node.op_type, 0) > opset:
            node.domain = RUNTIME
        fused = node.domain == RUNTIME and node.op_type in FUSED
        nodes += _parts(model.graph, node, opset) if fused else [node]
    if not any(o.domain == RUNTIME for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid(RUNTIME, 1))
    if len(nodes) != len(model.graph.node):
        copies = [type(n).FromString(n.SerializeToString()) for n in nodes]
        del model.graph.node[:]
        model.graph.node.extend(copies)


def _parts(graph: Any, node: Any, opset: int) -> Iterator[Any]:
    """Yield the operator inside a fused one, the sum with a fourth input of a convolution, and the activation."""
    from onnx import helper

    values = attributes_of(node)
    act = values.get("activation", b"")
    act = act.decode() if isinstance(act, bytes) else act
    if act and act not in ACTIVATIONS:
        raise ModelError(f"{node_label(node)}: the activation {act!r} is not one of {', '.join(ACTIVATIONS)}")
    inputs, result = list(node.input), node.output[0]
    added = inputs[3] if node.op_type == "FusedConv" and len(inputs) > 3 else ""
    names = [f"{result}.before_sum", f"{result}.before_activation"]
    out = names[0] if added else names[1] if act else result
    inner = helper.make_node(FUSED[node.op_type], inputs[:3], [out], node.name)
    inner.attribute.extend(a for a in node.attribute if a.name not in OWN)
    inner.metadata_props.extend(node.metadata_props)
    yield inner
    if added:
        yield helper.make_node("Add", [out, added], [names[1] if act else result])
    if act:
        numbers = list(values.get("activation_params", ())) or [
            values[n] for n in ("activation_alpha", "activation_beta") if n in values
        ]
        yield _activation(graph, act, numbers, names[1], result, opset)


def _activation(graph: Any, act: str, numbers: list[float], x: str, result: str, opset: int) -> Any:
    """Return the node of an activation."""
    from onnx import TensorProto, helper

    names = ("min", "max") if act == "Clip" and opset < 11 else ACTIVATIONS[act]
    if act != "Clip" or opset < 11:
        options: dict[str, Any] = dict(zip(names, numbers))
        return helper.make_node(act, [x], [result], **options)
    limits = [f"{result}.{n}" for n in ("min", "max")]
    for name, number in zip(limits, numbers):
        graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [number]))
    return helper.make_node(act, [x, *limits[: len(numbers)]], [result])


def add_shapes_(graph: Any, kinds: Any) -> int:
    """Tell the shapes of outputs of ONNX Runtime's operators, which ONNX's own inference does not know.

    Args:
        graph: the graph, which receives them as value_info.
        kinds: what is inferred so far: the ValueInfoProto of values, by name. Receives them too.

    Returns:
        How many were added.
    """
    added = 0
    for node in graph.node:
        if node.domain != RUNTIME or not node.output or node.output[0] in kinds:
            continue
        inputs = [kinds.get(n) for n in node.input]
        if inputs and inputs[0] is not None and node.op_type in LIKE_INPUT:
            shape_info = _named(inputs[0], node.output[0])
        elif node.op_type == "FusedMatMul" and None not in inputs[:2]:
            shape_info = _product(node, *inputs[:2])
        else:
            continue
        if shape_info is not None:
            graph.value_info.append(shape_info)
            kinds[node.output[0]] = shape_info  # for what reads it directly
            added += 1
    return added


def _named(value: Any, name: str) -> Any:
    copy = type(value).FromString(value.SerializeToString())
    copy.name = name
    return copy


def _product(node: Any, a: Any, b: Any) -> Any:
    """Return the ValueInfoProto of a FusedMatMul; None where it multiplies batches in another order or vectors."""
    values = attributes_of(node)
    left, right = (list(v.type.tensor_type.shape.dim) for v in (a, b))
    if values.get("transBatchA") or values.get("transBatchB") or min(len(left), len(right)) < 2:
        return None
    shape_info = _named(a, node.output[0])
    rows, columns = left[-1 if values.get("transA") else -2], right[-2 if values.get("transB") else -1]
    leading = left[:-2] if len(left) >= len(right) else right[:-2]
    del shape_info.type.tensor_type.shape.dim[:]
    shape_info.type.tensor_type.shape.dim.extend([*leading, rows, columns])
    return shape_info
