"""Convolutions of images with bias, residual and activation."""

from __future__ import annotations

from ctypes import addressof
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from rarefy.compiler import nhwc
from rarefy.compiler.fx_utils import Node
from rarefy.compiler.input_steps import (
    matrix_fields,
    out_sizes,
    pad_planes,
    quantize_input,
    quantize_static,
)
from rarefy.compiler.operators.linear import check_bias, check_dense_weight
from rarefy.compiler.operators.spec import IMAGES, Call, OpSpec, Shape
from rarefy.compiler.program import Program, Value
from rarefy.runtime.reference import ACTIVATIONS

Pair = tuple[int, int]


def conv2d(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, act: str | None, stride: Pair, padding: Pair,
    dilation: Pair, groups: int,
) -> Tensor:  # fmt: skip
    """Return act(x convolved with w + bias + residual); x is [batch, channels, height, width]."""
    y = F.conv2d(x, w, bias, stride, padding, dilation, groups)
    return ACTIVATIONS[act](y if residual is None else y + residual)


def _lower(p: Program, node: Node) -> None:
    """Add the step of a convolution: on NHWC images for dense and grouped weights, else on planes.

    Kernels of size and stride one on planes are linear steps.
    """
    if p.runs_on_nhwc(node):
        nhwc.lower_conv(p, node)
        return
    x, _, _, residual, _, stride, padding, _, _ = node.args
    kernel = p.kernels[node]
    batch = p.shape(x)[0]
    operands = {} if residual is None else {"residual": p.values[residual]}
    pointwise = tuple(kernel.shape[2:]) == (1, 1) and tuple(stride) == (1, 1) and tuple(padding) == (0, 0)
    if pointwise and x in p.values:
        source, scales, numbers = _codes(p, x, kernel, per_image=False)
        source, step = source or p.values[x], "linear"
        numbers |= matrix_fields(kernel)
    else:
        codes, scales, numbers = _codes(p, x, kernel, per_image=True)
        source, image = pad_planes(p, x, kernel.struct, 0.0, codes, numbers.get("in_zero", 0))
        step = "conv"
        numbers |= {"indirection": addressof(image), "batch": batch}
    if scales is not None:
        operands["in_scales"] = scales
    out = p.make(node)
    p.step(step, out, x=p.use(source), out=p.use(out), **numbers, **{n: p.use(v) for n, v in operands.items()})


def _codes(p: Program, x: Node, kernel: Any, per_image: bool) -> tuple[Value | None, Value | None, dict[str, Any]]:
    """Return an int8 kernel's input, its scales and the numbers of its step; None where there is none."""
    if kernel.held[0].kind != "int8":
        return None, None, {}
    if kernel.input_grid is not None:
        codes, numbers = quantize_static(p, x, kernel.input_grid)
        return codes, None, numbers
    return *quantize_input(p, x, "int8", per_image), {}


def _out_shape(call: Call) -> Shape:
    assert call.weight is not None
    x, weight = call.shapes[0], call.weight
    stride, padding, dilation = call.node.args[5:8]
    return (x[0], weight[0], *out_sizes(x[2:], weight[2:], stride, padding, dilation))


def _fits(call: Call) -> bool:
    assert call.weight is not None
    x, *residual = call.shapes
    groups = call.node.args[8]
    if len(x) != 4 or len(call.weight) != 4 or x[1] != call.weight[1] * groups or 0 in (*x, *call.weight):
        return False
    if call.weight[0] % groups:
        return False
    if call.packed is not None:  # which has a geometry of its own
        geometry = call.packed.stride, call.packed.padding, call.packed.dilation
        if geometry != tuple(tuple(a) for a in call.node.args[5:8]):
            return False
    out, bias = _out_shape(call), call.node.args[2]
    bias_fits = bias is None or tuple(call.constants[bias.name].shape) == call.weight[:1]
    return min(out) > 0 and residual in ([], [out]) and bias_fits


def _check_weights(call: Call) -> None:
    check_dense_weight(call, 4)
    check_bias(call)
    if call.packed is not None:
        geometry = call.packed.stride, call.packed.padding, call.packed.dilation, call.packed.groups
        if geometry != tuple(call.node.args[5:9]):
            raise ValueError(f"is a convolution of {call.node.args[5:9]}, but its packed weight is one of {geometry}")


OPERATORS = (
    OpSpec(
        reference=conv2d,
        arguments=("tensor", "weight", "constant?", "tensor?", "act", "steps", "padding", "steps", "count"),
        lower=_lower,
        fits=_fits,
        out_shape=_out_shape,
        layout=IMAGES,
        heavy=True,
        epilogue=True,
        own_call=True,
        packed_formats=("convolution",),
        check_weights=_check_weights,
    ),
)
