"""Codes of few bits in ONNX graphs as the numbers that they mean, and the places where values become codes.

weights      DequantizeLinear of constants, and those of integer operators, as floats with the grid that they lie on
activations  QuantizeLinear as a place where values are rounded; DequantizeLinear then has nothing to do
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
from rarefy.onnx.graph import Graph, attribute, make, only, place

CARRY = (
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
CODED = {  # what reads codes with a scale and a zero point each, and how many of them
    "QLinearConv": ("Conv", 2),
    "QLinearMatMul": ("MatMul", 2),
    "QGemm": ("Gemm", 2),
    "QLinearAdd": ("Add", 2),
    "QLinearMul": ("Mul", 2),
    "QLinearSigmoid": ("Sigmoid", 1),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", 1),
}


def unpack(graph: Graph) -> Iterable[Any]:
    """Operators that read and write codes as those on floats between DequantizeLinear and QuantizeLinear."""
    for node in graph.nodes:
        if node.op_type not in CODED:
            yield node
            continue
        kind, count = CODED[node.op_type]
        name, given, where = node.output[0], [*node.input, "", ""], place(node)
        rest = given[3 * count :]
        bias = rest.pop(0 if kind == "Gemm" else 2) if kind in ("Conv", "Gemm") else ""
        floats = [f"{name}_rarefy_{i}" for i in range(count)]
        for i, value in enumerate(floats):
            yield make("DequantizeLinear", given[3 * i : 3 * i + 3], [value], axis=_outputs_of(graph, node, kind))
        if bias:
            parts = [graph.constants.get(n) for n in (bias, given[1], given[4])]
            if any(p is None for p in parts):
                raise ModelError(f"{where}: the bias of a {node.op_type} and its scales are constants")
            codes, *scales = (np.asarray(p, np.float32).reshape(-1) for p in parts)
            floats.append(graph.new(codes * scales[0] * scales[1] * np.float32(attribute(node, "alpha", 1.0))))
        if not rest[0]:  # a QGemm may give floats
            yield make(kind, floats, [name], node, same=True)
            continue
        yield make(kind, floats, [f"{name}_rarefy_y"], node, same=True)
        yield make("QuantizeLinear", [f"{name}_rarefy_y", *rest[:2]], [name])


def _outputs_of(graph: Graph, node: Any, kind: str) -> int:
    """Which dimension of an operator's weights its outputs are."""
    weight = graph.constants.get(node.input[3]) if len(node.input) > 3 else None
    if kind == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 0 if kind == "Conv" or weight is None else weight.ndim - 1


def integers(graph: Graph) -> Iterable[Any]:
    """ConvInteger and MatMulInteger, with the Cast and the scale that follow, as the operator on floats.

    Their inputs come from QuantizeLinear (rounded statically) or DynamicQuantizeLinear (in each call).
    """
    users, producers = graph.users(), graph.producers()
    gone: set[int] = set()
    instead: dict[int, list[Any]] = {}
    for node in graph.nodes:
        if node.op_type not in ("ConvInteger", "MatMulInteger"):
            continue
        where = place(node)
        weight, codes = graph.constants.get(node.input[1]), producers.get(node.input[0])
        cast = only(users, graph, node.output[0], "Cast")
        scaled = None if cast is None else only(users, graph, cast.output[0], "Mul")
        if weight is None or codes is None or cast is None or scaled is None:
            raise ModelError(
                f"{where}: a {node.op_type} has constant weights, and a Cast and a Mul by its scale behind it"
            )
        factor = next(n for n in scaled.input if n != cast.output[0])
        zeros = [*node.input[2:], "", ""][:2]
        zero = graph.constants.get(zeros[1]) if zeros[1] else np.zeros(1)
        own = codes.output[2] if codes.op_type == "DynamicQuantizeLinear" else [*codes.input, "", ""][2]
        if zero is None or not _one_zero(graph, zeros[0], own):
            raise ModelError(f"{where}: its zero points are those that its inputs were quantized with, and constants")
        if codes.op_type == "QuantizeLinear":
            step, total = graph.scalar(codes.input[1]), graph.constants.get(factor)
            if step is None or total is None:
                raise ModelError(f"{where}: the scales before and behind a {node.op_type} are constants")
            scale, inputs = total.astype(np.float64) / step, _static(graph, codes, where)
        elif codes.op_type == "DynamicQuantizeLinear":
            product = producers.get(factor)
            parts = [] if product is None or product.op_type != "Mul" else list(product.input)
            of_weight = next((graph.constants[n] for n in parts if n in graph.constants), None)
            if codes.output[1] not in parts or of_weight is None:
                raise ModelError(f"{where}: its scale is the product of that of DynamicQuantizeLinear and a constant")
            scale, inputs = of_weight, ActivationQuant()
        else:
            raise ModelError(f"{where}: codes of {codes.op_type}; QuantizeLinear or DynamicQuantizeLinear makes them")
        axis = 0 if node.op_type == "ConvInteger" else weight.ndim - 1
        wide = [n for n in scale.shape if n > 1]
        along_outputs = not wide or scale.shape[-1 if axis else max(0, scale.ndim - weight.ndim + 1)] == wide[0]
        if len(wide) > 1 or not along_outputs or (wide and not axis and scale.ndim < weight.ndim - 1):
            raise ModelError(f"{where}: a scale of {list(scale.shape)} is not one for each output")
        name = f"{node.output[0]}_rarefy_w"
        dequantize(graph, name, weight, along(scale, weight, axis, where), along(zero, weight, axis, where))
        rounded = f"{node.output[0]}_rarefy_x"
        graph.rounded[rounded] = inputs
        stand = graph.stand(codes, Rounded(inputs), to=rounded)
        real = make(node.op_type.removesuffix("Integer"), [rounded, name], [scaled.output[0]], node, same=True)
        instead[id(scaled)] = [stand, real]
        gone |= {id(node), id(cast)}
    yield from graph.replaced(instead, gone)


def _one_zero(graph: Graph, said: str, own: str) -> bool:
    """Whether an integer operator takes the zero point off that its inputs were given."""
    if said == own:
        return True
    a, b = (graph.constants.get(n) if n else np.zeros(1) for n in (said, own))
    return a is not None and b is not None and a.size == b.size == 1 and int(a.reshape(-1)[0]) == int(b.reshape(-1)[0])


def weights(graph: Graph) -> Iterable[Any]:
    """DequantizeLinear of constants, and of rows that are looked up in one, as floats."""
    producers = graph.producers()
    for node in graph.nodes:
        where, gather = place(node), producers.get(node.input[0]) if node.input else None
        if node.op_type == "DequantizeLinear" and all(n in graph.constants for n in node.input if n):
            codes, scale = (graph.constants[n] for n in node.input[:2])
            zero = graph.constants[node.input[2]] if len(node.input) > 2 and node.input[2] else np.zeros(1)
            axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
            dequantize(graph, node.output[0], codes, *(along(a, codes, axis, where, block) for a in (scale, zero)))
        elif node.op_type == "DequantizeLinear" and gather is not None and _looked_up(graph, gather, node):
            codes, scale, zero = (graph.constants[n] for n in (gather.input[0], *node.input[1:3]))
            table = f"{node.output[0]}_rarefy_table"
            dequantize(graph, table, codes, *(along(a, codes, 0, where) for a in (scale, zero)))
            yield make("Gather", [table, gather.input[1]], node.output, gather)
        else:
            yield node


def _looked_up(graph: Graph, gather: Any, node: Any) -> bool:
    """Whether codes are rows of a constant, with one scale and zero point for all."""
    if gather.op_type != "Gather" or gather.input[0] not in graph.constants or len(node.input) < 3:
        return False
    return all(graph.scalar(n) is not None for n in node.input[1:3])


def dequantize(graph: Graph, name: str, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> None:
    """A constant of codes as floats, (c - zero) scale, with its grid where the codes are of 8 bits or less."""
    kind = str(codes.dtype)
    whole = codes.astype(np.float32) - _spread(zero.astype(np.float32), codes.shape)
    scale = scale.astype(np.float32)
    graph.constants[name] = np.asarray(whole * _spread(scale, whole.shape), np.float32)
    bits = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4}.get(kind)
    if bits is None or codes.ndim < 2:
        return
    half = 1 << (bits - 1)
    shift = half if kind.startswith("int") else 0
    zeros = torch.from_numpy((zero.astype(np.int64) + shift).astype(np.uint8))
    low = float(whole.min()) if whole.size else 0.0
    middle = bool((zeros == half).all()) and low >= (-half if bits < 8 else 1 - half)
    graph.grids[name] = Grid(bits, torch.from_numpy(scale), None if middle else zeros.expand(scale.shape).contiguous())


def _spread(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Scales or zero points, one a block of each dimension, in the shape of weights."""
    for d, (n, full) in enumerate(zip(array.shape, shape)):
        if n not in (1, full):
            array = np.repeat(array, full // n, d)
    return array


def along(array: np.ndarray, like: np.ndarray, axis: int, where: str, block: int = 0) -> np.ndarray:
    """Scales with as many dimensions as the weights that they belong to."""
    axis = axis + like.ndim if axis < 0 else axis
    if array.size == 1:
        return array.reshape((1,) * like.ndim)
    if block and array.ndim == like.ndim and 0 <= axis < like.ndim and array.shape[axis] * block == like.shape[axis]:
        return array
    if not block and 0 <= axis < like.ndim and array.size == like.shape[axis]:
        return array.reshape([-1 if d == axis else 1 for d in range(like.ndim)])
    raise ModelError(f"{where}: scales of {list(array.shape)} do not fit weights of {list(like.shape)}")


class Rounded(nn.Module):
    """Values on the points that codes of 8 bits can mean."""

    def __init__(self, inputs: ActivationQuant):
        super().__init__()
        self.inputs = inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inputs(x)

    def extra_repr(self) -> str:
        return repr(self.inputs)


def pairs(graph: Graph) -> Iterable[Any]:
    """QuantizeLinear as a place where values are rounded, and DequantizeLinear, which then has nothing to do, as none.

    Between them values may be moved about, and the greatest of some taken.
    """
    made, users = dict[str, ActivationQuant](), graph.users()
    for node in graph.nodes:
        where = place(node)
        if node.op_type == "QuantizeLinear":
            made[node.output[0]] = _static(graph, node, where)
            yield graph.stand(node, Rounded(made[node.output[0]]))
        elif node.op_type == "DequantizeLinear" and node.input[0] in made:
            if not _undone(graph, node, made[node.input[0]], where):
                raise ModelError(f"{where}: dequantized with another scale or zero point than it was quantized with")
            yield make("Identity", node.input[:1], node.output)
        else:
            if node.input and node.input[0] in made and node.op_type in CARRY:
                made[node.output[0]] = made[node.input[0]]
            yield node
    for name in made:
        if name in graph.outputs:
            raise ModelError(f"{name}: an output of codes; what gives numbers is read")
        strange = [n for n in users.get(name, ()) if n.op_type not in CARRY]
        if strange:
            raise ModelError(f"{strange[0].name or strange[0].output[0]}: {strange[0].op_type} on codes is not read")
    graph.rounded |= made


def _undone(graph: Graph, node: Any, made: ActivationQuant, where: str) -> bool:
    """Whether a DequantizeLinear takes back what made its codes; without a zero point it takes codes as they are."""
    if len(node.input) > 2 and node.input[2]:
        return _static(graph, node, where) == made
    return graph.scalar(node.input[1]) == made.scale and made.zero in (0, 1 << (made.bits - 1))


def _static(graph: Graph, node: Any, where: str) -> ActivationQuant:
    scale = graph.scalar(node.input[1])
    kind = {0: "uint8", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16"}.get(
        attribute(node, "output_dtype", 0), "float32"
    )
    zero = graph.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1, kind)
    if scale is None or zero is None or zero.size != 1:
        raise ModelError(f"{where}: activations in few bits have one scale and zero point, both constants")
    if not math.isfinite(scale) or scale <= 0:
        raise ModelError(f"{where}: a scale of {scale}")
    bits = {"int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int4": 4, "uint4": 4}.get(str(zero.dtype))
    if bits is None:
        raise ModelError(f"{where}: activations are rounded to whole numbers of 4, 8 or 16 bits, got {zero.dtype}")
    shift = 1 << (bits - 1) if str(zero.dtype).startswith("int") else 0
    return ActivationQuant(bits, scale, int(zero.reshape(-1)[0]) + shift)
