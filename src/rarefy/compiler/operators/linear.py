"""Linear layers: x w^T with bias, residual and activation."""

from __future__ import annotations

from ctypes import addressof
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.compiler.fx_utils import Node
from rarefy.compiler.input_steps import quantize_input, quantize_static
from rarefy.compiler.operators.spec import Call, OpSpec, Shape
from rarefy.compiler.program import Program, Value
from rarefy.runtime import bindings
from rarefy.runtime.packed_formats import DTYPES, Bitmask, QuantizedPanels
from rarefy.runtime.reference import ACTIVATIONS

EXACT = 3  # times fewer outputs than inputs, or twice as many times more
MIN_TILE_ROWS, MAX_NARROW_COLUMNS = 12, 32  # of csrc/step_common.hpp


def linear(
    x: Tensor, w: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, act: str | None = None
) -> Tensor:
    """Return act(x w^T + bias + residual); x is [.., inputs], w [outputs, inputs], residual [.., outputs]."""
    y = F.linear(x, w, bias)
    return ACTIVATIONS[act](y if residual is None else y + residual)


def _lower(p: Program, node: Node) -> None:
    x, _, _, residual, _ = node.args
    kernel = p.kernels[node]
    packed = kernel.held[0]
    precision = input_precision(packed, p.decode)
    source = p.values[x]
    terms = input_terms(packed, source.tokens.columns if p.decode else None) if precision == "int8" else 0
    extra: dict[str, Any] = {"two_terms": terms} | ({} if residual is None else {"residual": p.values[residual]})
    static: dict[str, Any] = {}
    if precision == "int8" and kernel.input_grid is not None and not p.decode:
        source, static = quantize_static(p, x, kernel.input_grid)
    elif precision != "fp32" or (p.decode and source.features % 64):
        source, scales = quantize_input(p, x, precision, two_terms=terms)
        extra |= {} if scales is None else {"in_scales": scales}
    if isinstance(packed, QuantizedPanels) and precision == "int8" and not p.decode and terms < 2:
        p.held.append(packed.row_sums.to(torch.int32))
        extra["row_sums"] = p.held[-1].data_ptr()
    out = p.make(node)
    fields = {n: p.use(v) if isinstance(v, Value) else v for n, v in extra.items()}
    fields |= {"weight": addressof(kernel.struct), "format": bindings.FORMATS.index(type(packed))}
    if isinstance(packed, QuantizedPanels):
        fields["dtype"] = DTYPES.index(precision)
    p.step("linear", out, x=p.use(source), out=p.use(out), **fields, **static)


def input_terms(packed: Any, columns: int | None) -> int:
    """Return how a weight reads inputs in int8: 0, in one term, 1, in two, or with a scale for each 32.

    That is 2, and 3 for 12 to 32 tokens, which become a tile at once. It is as fast as one term and loses little more
    than two, on CPUs with kernels for it. Weights that cost prompts little stay exact: those of few outputs, as keys
    and values have, and the head, which reads one token.

    Args:
        packed: the weight.
        columns: number of tokens of a decode step; None for a prompt.
    """
    if not getattr(packed, "two_terms", False):
        return 0
    outputs, inputs = packed.shape
    few = columns is not None and columns < MIN_TILE_ROWS
    cheap = EXACT * outputs <= inputs or (columns is None and outputs >= 2 * EXACT * inputs)
    exact = packed.kind == "int8" and (few or (cheap and not packed.scale_groups))
    if exact or not bindings.scales_blocks(rows=columns is not None):
        return 1
    return 3 if columns is not None and not few and columns <= MAX_NARROW_COLUMNS else 2


def input_precision(packed: Any, decode: bool) -> str:
    """Return the precision in which a kernel reads its inputs. A weight that is unpacked for many tokens reads them in
    fp32, or where the CPU is fast in it and single tokens are rounded anyway, in bf16."""
    if isinstance(packed, QuantizedPanels) and packed.scale_groups and not (decode or packed.fp32_inputs):
        if packed.two_terms and bindings.scales_blocks(rows=False):
            return "int8"
        whole = not 0 < packed.shape[1] % 64 <= 32  # blocks of bf16 have 32 inputs, those of panels 64
        return "bf16" if whole and bindings.multiplies_bf16() else "fp32"
    if isinstance(packed, QuantizedPanels):
        return "fp32" if packed.fp32_inputs else "int8"
    if isinstance(packed, Bitmask) and not decode:
        return "int8" if packed.kind == "int8" else "fp32"
    return "int8" if packed.kind == "int4" else packed.kind


def _out_shape(call: Call) -> Shape:
    assert call.weight is not None
    return (*call.shapes[0][:-1], call.weight[0])


def _fits(call: Call) -> bool:
    assert call.weight is not None
    x, *residual = call.shapes
    return x[-1] == call.weight[1] and residual in ([], [_out_shape(call)])


def check_bias(call: Call) -> None:
    """Raise ValueError unless the bias, argument 2, has one number for each row of the weight."""
    assert call.weight is not None
    bias = call.node.args[2]
    if bias is not None and (shape := tuple(call.constants[bias.name].shape)) != call.weight[:1]:
        raise ValueError(f"expected a bias of shape {list(call.weight[:1])}, got {list(shape)}")


def check_dense_weight(call: Call, dims: int) -> None:
    """Raise ValueError unless a weight that is not packed is floating point with so many dimensions."""
    weight = None if call.packed is not None else call.constants[call.node.args[1].name]
    if weight is not None and (weight.dim() != dims or not weight.is_floating_point()):
        raise ValueError(
            f"expected a floating-point weight with {dims} dimensions, got {weight.dtype} {list(weight.shape)}"
        )


def _check_weights(call: Call) -> None:
    check_dense_weight(call, 2)
    check_bias(call)


OPERATORS = (
    OpSpec(
        reference=linear,
        arguments=("tensor", "weight", "constant?", "tensor?", "act"),
        lower=_lower,
        fits=_fits,
        out_shape=_out_shape,
        heavy=True,
        epilogue=True,
        per_row=True,
        packed_formats=("tiles", "sell", "bitmask", "panels", "fours"),
        check_weights=_check_weights,
    ),
)
