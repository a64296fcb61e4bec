"""Operators on codes of quantized tensors, as written: what the passes of qdq.py could not turn into floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.onnx.dtypes import dtype_of
from rarefy.onnx.operators.arithmetic import to_float8
from rarefy.onnx.operators.conv import conv
from rarefy.onnx.operators.signature import Ints, axis_of, require

RANGES = {
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.uint16: (0, 65535),
    torch.int16: (-32768, 32767),
    torch.int32: (-(1 << 31), (1 << 31) - 1),
}


def along(small: Tensor, x: Tensor, axis: int, block_size: int = 0) -> Tensor:
    """Return scales or zero points so that they broadcast with x: one for all, for each slice or for each block."""
    if small.numel() == 1:
        return small.reshape(())
    axis = axis_of(axis, x.dim())
    if block_size:
        return small.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    return small.reshape([-1 if d == axis else 1 for d in range(x.dim())])


def quantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, block_size: int = 0,
    output_dtype: int = 0, precision: int = 0, saturate: int = 1,
) -> Tensor:  # fmt: skip
    dtype = torch.uint8 if not output_dtype else dtype_of(output_dtype, "QuantizeLinear")
    dtype = dtype if zero_point is None else zero_point.dtype
    wide = x if not precision else x.to(dtype_of(precision, "QuantizeLinear"))
    value = wide / along(scale, x, axis, block_size).to(wide.dtype)
    if dtype.is_floating_point:
        return to_float8(value.float(), dtype, bool(saturate))
    require(dtype in RANGES, f"QuantizeLinear to {dtype} is not supported")
    codes = value.round().to(torch.int64).clamp(-(1 << 31), (1 << 31) - 1)
    if zero_point is not None:
        codes = codes + along(zero_point.to(torch.int64), x, axis, block_size)
    return codes.clamp(*RANGES[dtype]).to(dtype)


def dequantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int = 1, block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:  # fmt: skip
    shifted = x.to(torch.float32)
    if zero_point is not None:
        shifted = shifted - along(zero_point.to(torch.float32), x, axis, block_size)
    y = shifted * along(scale, x, axis, block_size).to(torch.float32)
    return y.to(dtype_of(output_dtype, "DequantizeLinear") if output_dtype else scale.dtype)


def dynamic_quantize_linear(x: Tensor, *, outputs: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = torch.where(high == low, 1.0, high - low) / 255
    zero = (-low / scale).clamp(0, 255).round()
    codes = ((x / scale).round() + zero).clamp(0, 255)
    return codes.to(torch.uint8), scale, zero.to(torch.uint8)


def _shifted(x: Tensor, zero_point: Tensor | None, rows: bool) -> Tensor:
    """Return codes less their zero point, exact in float64; a zero point for each row or column is one of a vector."""
    value = x.to(torch.float64)
    if zero_point is None:
        return value
    zero = zero_point.to(torch.float64)
    return value - (zero[..., None] if rows and zero.dim() == 1 and zero.numel() > 1 else zero)


def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    return (_shifted(a, a_zero, True) @ _shifted(b, b_zero, False)).to(torch.int64).to(torch.int32)


def conv_integer(
    x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None, *, auto_pad: str = "NOTSET",
    dilations: Ints | None = None, group: int = 1, kernel_shape: Ints | None = None, pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:  # fmt: skip
    weight = w.to(torch.float64)
    if w_zero is not None:
        weight = weight - along(w_zero.to(torch.float64), w, 0)
    y = conv(
        _shifted(x, x_zero, False), weight, auto_pad=auto_pad, dilations=dilations, group=group,
        kernel_shape=kernel_shape, pads=pads, strides=strides,
    )  # fmt: skip
    return y.round().to(torch.int64).to(torch.int32)


def _requantized(value: Tensor, scale: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    codes = (value.float() * scale).round()
    codes = codes if zero is None else codes + zero.to(torch.float32)
    return codes.clamp(*RANGES[dtype]).to(dtype)


def qlinear_matmul(
    a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:  # fmt: skip
    product = _shifted(a, a_zero, True) @ _shifted(b, b_zero, False)
    rows = a_scale[..., None] if a_scale.dim() == 1 and a_scale.numel() > 1 else a_scale
    return _requantized(product, (rows * b_scale / y_scale).float(), y_zero, y_zero.dtype)


def qlinear_conv(
    x: Tensor, x_scale: Tensor, x_zero: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor, y_scale: Tensor,
    y_zero: Tensor, bias: Tensor | None = None, *, auto_pad: str = "NOTSET", dilations: Ints | None = None,
    group: int = 1, kernel_shape: Ints | None = None, pads: Ints | None = None, strides: Ints | None = None,
) -> Tensor:  # fmt: skip
    options: dict[str, Any] = {
        "auto_pad": auto_pad, "dilations": dilations, "group": group, "kernel_shape": kernel_shape, "pads": pads,
        "strides": strides,
    }  # fmt: skip
    y = conv_integer(x, w, x_zero, w_zero, **options)
    if bias is not None:
        y = y + along(bias, y, 1)
    scale = along(w_scale, y, 1) * x_scale.reshape(()) / y_scale.reshape(())
    return _requantized(y, scale, y_zero, y_zero.dtype)
