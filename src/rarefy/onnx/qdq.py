"""Passes on quantized ONNX graphs: all operators compute in floating point afterwards.

Weights: DequantizeLinear of constants, and the weights of integer operators, become fp32 constants with their grid.
Activations: QuantizeLinear becomes fake quantization, and DequantizeLinear is removed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from rarefy.common.errors import ModelError
from rarefy.model.activation_quant import ActivationQuant
from rarefy.model.quant_grid import Grid
from rarefy.onnx.graph import Graph, attribute, make_node, node_label, only_user

KEEP_CODES = (  # operators that move codes or choose among them
    "Transpose",
    "Reshape",
    "Squeeze",
    "Unsqueeze",
    "Identity",
    "Flatten",
    "MaxPool",
    "Gather",
    "Slice",
    "DequantizeLinear",
)
QLINEAR_OPS = {  # operator on codes: (operator on floats, number of inputs with a scale and a zero point)
    "QLinearConv": ("Conv", 2),
    "QLinearMatMul": ("MatMul", 2),
    "QGemm": ("Gemm", 2),
    "QLinearAdd": ("Add", 2),
    "QLinearMul": ("Mul", 2),
    "QLinearSigmoid": ("Sigmoid", 1),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", 1),
}


def expand_qlinear(graph: Graph) -> Iterable[Any]:
    """Replace operators that read and write codes by those on floats, between DequantizeLinear and QuantizeLinear."""
    for node in graph.nodes:
        if node.op_type not in QLINEAR_OPS:
            yield node
            continue
        kind, count = QLINEAR_OPS[node.op_type]
        name, inputs, where = node.output[0], [*node.input, "", ""], node_label(node)
        rest = inputs[3 * count :]
        bias = rest.pop(0 if kind == "Gemm" else 2) if kind in ("Conv", "Gemm") else ""
        floats = [f"{name}_rarefy_{i}" for i in range(count)]
        for i, value in enumerate(floats):
            yield make_node(
                "DequantizeLinear", inputs[3 * i : 3 * i + 3], [value], axis=_output_axis(graph, node, kind)
            )
        if bias:
            parts = [graph.constants.get(n) for n in (bias, inputs[1], inputs[4])]
            if any(p is None for p in parts):
                raise ModelError(f"{where}: the bias of a {node.op_type} and its scales must be constants")
            codes, *scales = (np.asarray(p, np.float32).reshape(-1) for p in parts)
            floats.append(graph.add_constant(codes * scales[0] * scales[1] * np.float32(attribute(node, "alpha", 1.0))))
        if not rest[0]:  # a QGemm without an output scale returns floats
            yield make_node(kind, floats, [name], node, same=True)
            continue
        yield make_node(kind, floats, [f"{name}_rarefy_y"], node, same=True)
        yield make_node("QuantizeLinear", [f"{name}_rarefy_y", *rest[:2]], [name])


def _output_axis(graph: Graph, node: Any, kind: str) -> int:
    """The dimension of an operator's weight along which its outputs run."""
    weight = graph.constants.get(node.input[3]) if len(node.input) > 3 else None
    if kind == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 0 if kind == "Conv" or weight is None else weight.ndim - 1


def fuse_integer_ops(graph: Graph) -> Iterable[Any]:
    """Fuse ConvInteger and MatMulInteger with the Cast and the scale that follow into the operator on floats.

    Their inputs come from QuantizeLinear (static) or DynamicQuantizeLinear (dynamic).
    """
    users, producers = graph.users(), graph.producers()
    removed: set[int] = set()
    replacements: dict[int, list[Any]] = {}
    for node in graph.nodes:
        if node.op_type not in ("ConvInteger", "MatMulInteger"):
            continue
        where = node_label(node)
        weight, codes = graph.constants.get(node.input[1]), producers.get(node.input[0])
        cast = only_user(users, graph, node.output[0], "Cast")
        scaled = None if cast is None else only_user(users, graph, cast.output[0], "Mul")
        if weight is None or codes is None or cast is None or scaled is None:
            raise ModelError(
                f"{where}: a {node.op_type} must have constant weights, with a Cast and a Mul by its scale after it"
            )
        factor = next(n for n in scaled.input if n != cast.output[0])
        zeros = [*node.input[2:], "", ""][:2]
        zero = graph.constants.get(zeros[1]) if zeros[1] else np.zeros(1)
        zero_name = codes.output[2] if codes.op_type == "DynamicQuantizeLinear" else [*codes.input, "", ""][2]
        if zero is None or not _same_zero_point(graph, zeros[0], zero_name):
            raise ModelError(
                f"{where}: its zero points must be constants, and those that its inputs were quantized with"
            )
        if codes.op_type == "QuantizeLinear":
            step, total = graph.scalar(codes.input[1]), graph.constants.get(factor)
            if step is None or total is None:
                raise ModelError(f"{where}: the scales before and after a {node.op_type} must be constants")
            scale, inputs = total.astype(np.float64) / step, _static(graph, codes, where)
        elif codes.op_type == "DynamicQuantizeLinear":
            product = producers.get(factor)
            parts = [] if product is None or product.op_type != "Mul" else list(product.input)
            of_weight = next((graph.constants[n] for n in parts if n in graph.constants), None)
            if codes.output[1] not in parts or of_weight is None:
                raise ModelError(f"{where}: its scale must be that of DynamicQuantizeLinear times a constant")
            scale, inputs = of_weight, ActivationQuant()
        else:
            raise ModelError(f"{where}: codes of {codes.op_type}, must be of QuantizeLinear or DynamicQuantizeLinear")
        axis = 0 if node.op_type == "ConvInteger" else weight.ndim - 1
        sizes = [n for n in scale.shape if n > 1]
        along_outputs = not sizes or scale.shape[-1 if axis else max(0, scale.ndim - weight.ndim + 1)] == sizes[0]
        if len(sizes) > 1 or not along_outputs or (sizes and not axis and scale.ndim < weight.ndim - 1):
            raise ModelError(f"{where}: a scale of {list(scale.shape)} is not one for each output")
        name = f"{node.output[0]}_rarefy_w"
        dequantize(graph, name, weight, along(scale, weight, axis, where), along(zero, weight, axis, where))
        rounded = f"{node.output[0]}_rarefy_x"
        graph.quantized[rounded] = inputs
        identity = graph.substitute(codes, FakeQuantize(inputs), target=rounded)
        fused = make_node(node.op_type.removesuffix("Integer"), [rounded, name], [scaled.output[0]], node, same=True)
        replacements[id(scaled)] = [identity, fused]
        removed |= {id(node), id(cast)}
    yield from graph.rewritten(replacements, removed)


def _same_zero_point(graph: Graph, subtracted: str, added: str) -> bool:
    """Whether an integer operator subtracts the zero point that its inputs were quantized with."""
    if subtracted == added:
        return True
    a, b = (graph.constants.get(n) if n else np.zeros(1) for n in (subtracted, added))
    return a is not None and b is not None and a.size == b.size == 1 and int(a.reshape(-1)[0]) == int(b.reshape(-1)[0])


def dequantize_weights(graph: Graph) -> Iterable[Any]:
    """Compute DequantizeLinear of constants, and of rows gathered from one."""
    producers = graph.producers()
    for node in graph.nodes:
        where, gather = node_label(node), producers.get(node.input[0]) if node.input else None
        if node.op_type == "DequantizeLinear" and all(n in graph.constants for n in node.input if n):
            codes, scale = (graph.constants[n] for n in node.input[:2])
            zero = graph.constants[node.input[2]] if len(node.input) > 2 and node.input[2] else np.zeros(1)
            axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
            dequantize(graph, node.output[0], codes, *(along(a, codes, axis, where, block) for a in (scale, zero)))
        elif node.op_type == "DequantizeLinear" and gather is not None and _is_gathered(graph, gather, node):
            codes, scale, zero = (graph.constants[n] for n in (gather.input[0], *node.input[1:3]))
            table = f"{node.output[0]}_rarefy_table"
            dequantize(graph, table, codes, *(along(a, codes, 0, where) for a in (scale, zero)))
            yield make_node("Gather", [table, gather.input[1]], node.output, gather)
        else:
            yield node


def _is_gathered(graph: Graph, gather: Any, node: Any) -> bool:
    """Whether codes are rows gathered from a constant, with one scale and zero point for all."""
    if gather.op_type != "Gather" or gather.input[0] not in graph.constants or len(node.input) < 3:
        return False
    return all(graph.scalar(n) is not None for n in node.input[1:3])


def dequantize(graph: Graph, name: str, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> None:
    """Add the constant (codes - zero) scale, with its grid if the codes have at most 8 bits."""
    kind = str(codes.dtype)
    shifted = codes.astype(np.float32) - _expand(zero.astype(np.float32), codes.shape)
    scale = scale.astype(np.float32)
    graph.constants[name] = np.asarray(shifted * _expand(scale, shifted.shape), np.float32)
    bits = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4}.get(kind)
    if bits is None or codes.ndim < 2:
        return
    half = 1 << (bits - 1)
    shift = half if kind.startswith("int") else 0
    zeros = torch.from_numpy((zero.astype(np.int64) + shift).astype(np.uint8))
    low = float(shifted.min()) if shifted.size else 0.0
    symmetric = bool((zeros == half).all()) and low >= (-half if bits < 8 else 1 - half)
    graph.grids[name] = Grid(
        bits, torch.from_numpy(scale), None if symmetric else zeros.expand(scale.shape).contiguous()
    )


def _expand(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scales or zero points of blocks, repeated to the shape of the weight."""
    for d, (n, full) in enumerate(zip(array.shape, shape)):
        if n not in (1, full):
            array = np.repeat(array, full // n, d)
    return array


def along(array: np.ndarray, like: np.ndarray, axis: int, where: str, block: int = 0) -> np.ndarray:
    """Return scales with as many dimensions as the weight that they belong to."""
    axis = axis + like.ndim if axis < 0 else axis
    if array.size == 1:
        return array.reshape((1,) * like.ndim)
    if block and array.ndim == like.ndim and 0 <= axis < like.ndim and array.shape[axis] * block == like.shape[axis]:
        return array
    if not block and 0 <= axis < like.ndim and array.size == like.shape[axis]:
        return array.reshape([-1 if d == axis else 1 for d in range(like.ndim)])
    raise ModelError(f"{where}: scales of {list(array.shape)} do not fit weights of {list(like.shape)}")


class FakeQuantize(nn.Module):
    """Round values to those that codes can represent."""

    def __init__(self, inputs: ActivationQuant):
        super().__init__()
        self.inputs = inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inputs(x)

    def extra_repr(self) -> str:
        return repr(self.inputs)


def fake_quantize_activations(graph: Graph) -> Iterable[Any]:
    """Replace QuantizeLinear by fake quantization, and remove DequantizeLinear.

    Between them only operators may stand that move codes or choose among them.
    """
    codes, users = dict[str, ActivationQuant](), graph.users()
    for node in graph.nodes:
        where = node_label(node)
        if node.op_type == "QuantizeLinear":
            codes[node.output[0]] = _static(graph, node, where)
            yield graph.substitute(node, FakeQuantize(codes[node.output[0]]))
        elif node.op_type == "DequantizeLinear" and node.input[0] in codes:
            if not _inverts(graph, node, codes[node.input[0]], where):
                raise ModelError(f"{where}: dequantized with another scale or zero point than it was quantized with")
            yield make_node("Identity", node.input[:1], node.output)
        else:
            if node.input and node.input[0] in codes and node.op_type in KEEP_CODES:
                codes[node.output[0]] = codes[node.input[0]]
            yield node
    for name in codes:
        if name in graph.outputs:
            raise ModelError(f"{name}: the graph's outputs must be numbers, not codes")
        unsupported = [n for n in users.get(name, ()) if n.op_type not in KEEP_CODES]
        if unsupported:
            raise ModelError(f"{node_label(unsupported[0])}: {unsupported[0].op_type} on codes is not supported")
    graph.quantized |= codes


def _inverts(graph: Graph, node: Any, quant: ActivationQuant, where: str) -> bool:
    """Whether a DequantizeLinear inverts a quantization; without a zero point of its own it has zero."""
    if len(node.input) > 2 and node.input[2]:
        return _static(graph, node, where) == quant
    return graph.scalar(node.input[1]) == quant.scale and quant.zero in (0, 1 << (quant.bits - 1))


def _static(graph: Graph, node: Any, where: str) -> ActivationQuant:
    scale = graph.scalar(node.input[1])
    kind = {0: "uint8", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16"}.get(
        attribute(node, "output_dtype", 0), "float32"
    )
    zero = graph.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1, kind)
    if scale is None or zero is None or zero.size != 1:
        raise ModelError(f"{where}: quantized activations must have one scale and zero point, both constants")
    if not math.isfinite(scale) or scale <= 0:
        raise ModelError(f"{where}: the scale must be above zero and finite, got {scale}")
    bits = {"int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int4": 4, "uint4": 4}.get(str(zero.dtype))
    if bits is None:
        raise ModelError(f"{where}: activations must be quantized to integers of 4, 8 or 16 bits, got {zero.dtype}")
    shift = 1 << (bits - 1) if str(zero.dtype).startswith("int") else 0
    return ActivationQuant(bits, scale, int(zero.reshape(-1)[0]) + shift)
