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

from rarefy.common.errors import ModelError
from rarefy.model.activation_quant import ActivationQuant
from rarefy.model.quant_grid import Grid
from rarefy.onnx.binding import node_label
from rarefy.onnx.graph import Graph, attribute, inputs_of, make_node, only_user
from rarefy.onnx.modules import FakeQuantize

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
        kind, count = QLINEAR_OPS.get(node.op_type, ("", 0))
        if not kind or not _can_expand(graph, node, kind):
            yield node
            continue
        name, inputs = node.output[0], [*node.input, "", ""]
        rest = inputs[3 * count :]
        bias = rest.pop(0 if kind == "Gemm" else 2) if kind in ("Conv", "Gemm") else ""
        floats = [f"{name}_rarefy_{i}" for i in range(count)]
        for i, value in enumerate(floats):
            yield make_node(
                "DequantizeLinear", inputs[3 * i : 3 * i + 3], [value], axis=_output_axis(graph, node, kind)
            )
        if bias:
            parts = [graph.constants[n] for n in (bias, inputs[1], inputs[4])]
            codes, *scales = (np.asarray(p, np.float32).reshape(-1) for p in parts)
            floats.append(graph.add_constant(codes * scales[0] * scales[1] * np.float32(attribute(node, "alpha", 1.0))))
        if not rest[0]:  # a QGemm without an output scale returns floats
            yield make_node(kind, floats, [name], node, same=True)
            continue
        yield make_node(kind, floats, [f"{name}_rarefy_y"], node, same=True)
        yield make_node("QuantizeLinear", [f"{name}_rarefy_y", *rest[:2]], [name])


def _can_expand(graph: Graph, node: Any, kind: str) -> bool:
    """Return whether weights, scales and the bias are constants; otherwise the operator runs on codes, as written."""
    if kind not in ("Conv", "MatMul", "Gemm"):
        return True
    names = [*node.input[1:6], *(node.input[8:9] if kind == "Conv" else node.input[6:7] if kind == "Gemm" else ())]
    return all(n in graph.constants for n in names if n)


def _output_axis(graph: Graph, node: Any, kind: str) -> int:
    """Return the dimension of an operator's weight along which its outputs run."""
    weight = graph.constants.get(node.input[3]) if len(node.input) > 3 else None
    if kind == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return 0 if kind == "Conv" or weight is None else weight.ndim - 1


def fuse_integer_ops(graph: Graph) -> Iterable[Any]:
    """Fuse ConvInteger and MatMulInteger with the Cast and the scale that follow into the operator on floats.

    Their inputs come from QuantizeLinear (static) or DynamicQuantizeLinear (dynamic). Others run on codes.
    """
    users, producers = graph.users(), graph.producers()
    removed: set[int] = set()
    replacements: dict[int, list[Any]] = {}
    for node in graph.nodes:
        if node.op_type not in ("ConvInteger", "MatMulInteger"):
            continue
        weight, codes = graph.constants.get(node.input[1]), producers.get(node.input[0])
        cast = only_user(users, graph, node.output[0], "Cast")
        scaled = None if cast is None else only_user(users, graph, cast.output[0], "Mul")
        if weight is None or codes is None or cast is None or scaled is None:
            continue
        factor = next(n for n in scaled.input if n != cast.output[0])
        zero = _weight_zero_point(graph, node, codes)
        match = _integer_scale(graph, producers, codes, factor)
        axis = 0 if node.op_type == "ConvInteger" else weight.ndim - 1
        if zero is None or match is None or not _is_per_output(match[0], weight, axis):
            continue
        scale, inputs = match
        name, where = f"{node.output[0]}_rarefy_w", node_label(node)
        dequantize(graph, name, weight, along(scale, weight, axis, where), along(zero, weight, axis, where))
        rounded = f"{node.output[0]}_rarefy_x"
        graph.quantized[rounded] = inputs
        identity = graph.substitute(codes, FakeQuantize(inputs), target=rounded)
        fused = make_node(node.op_type.removesuffix("Integer"), [rounded, name], [scaled.output[0]], node, same=True)
        replacements[id(scaled)] = [identity, fused]
        removed |= {id(node), id(cast)}
    yield from graph.rewritten(replacements, removed)


def _weight_zero_point(graph: Graph, node: Any, codes: Any) -> np.ndarray | None:
    """Return the zero point of an integer operator's weights, if the one of its inputs is that of their codes."""
    zeros = [*node.input[2:], "", ""][:2]
    zero = graph.constants.get(zeros[1]) if zeros[1] else np.zeros(1)
    zero_name = codes.output[2] if codes.op_type == "DynamicQuantizeLinear" else [*codes.input, "", ""][2]
    return zero if _same_zero_point(graph, zeros[0], zero_name) else None


def _integer_scale(
    graph: Graph, producers: dict[str, Any], codes: Any, factor: str
) -> tuple[np.ndarray, ActivationQuant] | None:
    """Return the scale of the weights and how the inputs are quantized, from the factor after an integer operator."""
    if codes.op_type == "QuantizeLinear":
        step, total = graph.scalar(codes.input[1]), graph.constants.get(factor)
        inputs = _static(graph, codes, node_label(codes))
        return None if step is None or total is None or inputs is None else (total.astype(np.float64) / step, inputs)
    if codes.op_type == "DynamicQuantizeLinear":
        product = producers.get(factor)
        parts = [] if product is None or product.op_type != "Mul" else list(product.input)
        of_weight = next((graph.constants[n] for n in parts if n in graph.constants), None)
        return None if codes.output[1] not in parts or of_weight is None else (of_weight, ActivationQuant())
    return None


def _is_per_output(scale: np.ndarray, weight: np.ndarray, axis: int) -> bool:
    """Return whether a scale is one for all outputs or one for each."""
    sizes = [n for n in scale.shape if n > 1]
    along_outputs = not sizes or scale.shape[-1 if axis else max(0, scale.ndim - weight.ndim + 1)] == sizes[0]
    return len(sizes) < 2 and along_outputs and not (sizes and not axis and scale.ndim < weight.ndim - 1)


def _same_zero_point(graph: Graph, subtracted: str, added: str) -> bool:
    """Return whether an integer operator subtracts the zero point that its inputs were quantized with."""
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
    """Return whether codes are rows gathered from a constant, with one scale and zero point for all."""
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
    """Return scales or zero points of blocks, repeated to the shape of the weight."""
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


def fake_quantize_activations(graph: Graph) -> Iterable[Any]:
    """Replace QuantizeLinear by fake quantization, and remove DequantizeLinear, where only operators stand between them
    that move codes or choose among them; elsewhere both stay."""
    codes, fused = _code_paths(graph)
    for node in graph.nodes:
        quant = codes.get(node.output[0]) if node.op_type == "QuantizeLinear" else None
        if quant is not None and quant[0] in fused:
            yield graph.substitute(node, FakeQuantize(quant[1]))
        elif node.op_type == "DequantizeLinear" and codes.get(node.input[0], ("",))[0] in fused:
            yield make_node("Identity", node.input[:1], node.output)
        else:
            yield node
    graph.quantized |= {name: quant for name, (source, quant) in codes.items() if source in fused}


def _code_paths(graph: Graph) -> tuple[dict[str, tuple[str, ActivationQuant]], set[str]]:
    """Return the values that are codes, and the QuantizeLinear whose codes are all dequantized as they were quantized.

    Each value comes with the QuantizeLinear it comes from, and how that quantizes.
    """
    codes: dict[str, tuple[str, ActivationQuant]] = {}
    others: set[str] = set()
    dequantized: set[str] = set()
    for node in graph.nodes:
        if node.op_type == "QuantizeLinear" and (quant := _static(graph, node, node_label(node))) is not None:
            codes[node.output[0]] = (node.output[0], quant)
            continue
        for name in inputs_of(node):
            if name not in codes:
                continue
            source, quant = codes[name]
            if node.op_type == "DequantizeLinear" and name == node.input[0] and _inverts(graph, node, quant):
                dequantized.add(source)
            elif node.op_type in KEEP_CODES and node.op_type != "DequantizeLinear" and name == node.input[0]:
                codes[node.output[0]] = codes[name]
            else:
                others.add(source)
    others |= {codes[name][0] for name in graph.outputs if name in codes}
    return codes, dequantized - others


def _inverts(graph: Graph, node: Any, quant: ActivationQuant) -> bool:
    """Return whether a DequantizeLinear inverts a quantization; without a zero point of its own it has zero."""
    if len(node.input) > 2 and node.input[2]:
        return _static(graph, node, node_label(node)) == quant
    return graph.scalar(node.input[1]) == quant.scale and quant.zero in (0, 1 << (quant.bits - 1))


def _static(graph: Graph, node: Any, where: str) -> ActivationQuant | None:
    """Return how a QuantizeLinear rounds, if it has one constant scale and zero point for all."""
    scale = graph.scalar(node.input[1])
    kind = {0: "uint8", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16"}.get(
        attribute(node, "output_dtype", 0), "float32"
    )
    zero = graph.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1, kind)
    if scale is None or zero is None or zero.size != 1:
        return None
    if not math.isfinite(scale) or scale <= 0:
        raise ModelError(f"{where}: the scale must be above zero and finite, got {scale}")
    bits = {"int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int4": 4, "uint4": 4}.get(str(zero.dtype))
    if bits is None:
        return None
    shift = 1 << (bits - 1) if str(zero.dtype).startswith("int") else 0
    return ActivationQuant(bits, scale, int(zero.reshape(-1)[0]) + shift)
