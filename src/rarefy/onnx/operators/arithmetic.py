"""Operators on single elements: arithmetic, activations, comparisons, logic and casts."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.onnx.dtypes import WIDE_UNSIGNED, dtype_of
from rarefy.onnx.operators.signature import Function, Number, require

SIGN = -(1 << 63)  # the highest bit of 64-bit integers


def binary(function: Function, a: Any, b: Any) -> Any:
    """Compute a function of two tensors or numbers; 16- to 64-bit unsigned integers as signed ones of 64 bits."""
    dtype = next((x.dtype for x in (a, b) if isinstance(x, Tensor)), None)
    if dtype not in WIDE_UNSIGNED:
        return function(a, b)
    result = function(*(signed(x) if isinstance(x, Tensor) else x for x in (a, b)))
    return result if result.dtype == torch.bool else unsigned(result, dtype)


def signed(x: Tensor) -> Tensor:
    """Return unsigned integers of more than 8 bits as int64, those of 64 bits with the same bits."""
    if x.dtype == torch.uint64:
        return x.view(torch.int64)
    return x.to(torch.int64) if x.dtype in WIDE_UNSIGNED else x


def unsigned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return int64 as unsigned integers, modulo their range."""
    return x.contiguous().view(torch.uint64) if dtype == torch.uint64 else x.to(dtype)


def ordered(x: Tensor) -> Tensor:
    """Return unsigned integers of more than 8 bits as int64 in the same order."""
    return x.view(torch.int64) ^ SIGN if x.dtype == torch.uint64 else signed(x)


def compare(function: Function, a: Any, b: Any) -> Any:
    """Compare tensors or numbers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return function(ordered(a), ordered(b))
    return binary(function, a, b)


def _quotient(a: Any, b: Any) -> Any:
    """Return the quotient of floats, or of integers without its fraction."""
    kinds = [x for x in (a, b) if isinstance(x, Tensor)]
    if kinds[0].is_floating_point() or kinds[0].is_complex():
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def _unsigned_division(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the quotient and remainder of integers of 64 bits, read as unsigned."""
    half = torch.div((a >> 1) & ~SIGN, b.clamp(min=1), rounding_mode="trunc") << 1
    rest = a - half * b
    more = ((rest ^ SIGN) >= (b ^ SIGN)).to(torch.int64)
    large = ((a ^ SIGN) >= (b ^ SIGN)).to(torch.int64)
    quotient = torch.where(b < 0, large, half + more)
    return quotient, a - quotient * b


def divide(a: Number, b: Number) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == torch.uint64:
        return _unsigned_division(a.view(torch.int64), b.view(torch.int64))[0].view(torch.uint64)
    return binary(_quotient, a, b)


def modulo(a: Number, b: Number, *, fmod: int = 0) -> Any:
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == torch.uint64:
        return _unsigned_division(a.view(torch.int64), b.view(torch.int64))[1].view(torch.uint64)
    return binary(torch.fmod if fmod else torch.remainder, a, b)


def power(x: Tensor, exponent: Number) -> Tensor:
    if isinstance(exponent, Tensor):
        return torch.pow(signed(x), signed(exponent)).to(x.dtype)
    if x.is_floating_point():
        return torch.pow(x, exponent)
    dtype = torch.int64 if isinstance(exponent, int) else torch.float32
    return torch.pow(x, torch.tensor(exponent, dtype=dtype)).to(x.dtype)


def bitwise_not(x: Tensor) -> Tensor:
    return unsigned(~signed(x), x.dtype) if x.dtype in WIDE_UNSIGNED else torch.bitwise_not(x)


def shift(x: Tensor, by: Tensor, *, direction: str) -> Tensor:
    wide = {torch.uint32: torch.uint64}.get(x.dtype, x.dtype)
    if direction == "LEFT":
        return binary(operator.lshift, x, by)
    if wide != torch.uint64 or x.dtype == torch.uint32:
        return binary(operator.rshift, x, by)
    bits, by = x.view(torch.int64), by.view(torch.int64)
    first = (bits >> 1) & ~SIGN  # without the sign
    return torch.where(by == 0, bits, first >> (by - 1).clamp(min=0)).view(torch.uint64)


def variadic(function: Function, *tensors: Tensor) -> Tensor:
    """Reduce any number of tensors."""
    return reduce(partial(binary, function), tensors)


def extreme(function: Function, *tensors: Tensor) -> Tensor:
    """Return the largest or smallest of any number of tensors."""
    if tensors[0].dtype == torch.uint64:
        return (reduce(function, map(ordered, tensors)) ^ SIGN).view(torch.uint64)
    return variadic(function, *tensors)


def mean(*tensors: Tensor) -> Tensor:
    return variadic(operator.add, *tensors) / len(tensors)


def clip(x: Tensor, min: Number | None = None, max: Number | None = None) -> Tensor:
    if x.dtype in WIDE_UNSIGNED:
        return unsigned(clip(signed(x), *(signed(b) if isinstance(b, Tensor) else b for b in (min, max))), x.dtype)
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        x = x if min is None else torch.maximum(x, torch.as_tensor(min, dtype=x.dtype))
        return x if max is None else torch.minimum(x, torch.as_tensor(max, dtype=x.dtype))
    if min == 0 and max == 6 and x.is_floating_point():
        return F.relu6(x)
    return x.clone() if min is None and max is None else torch.clamp(x, min, max)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    if math.isclose(alpha, 1 / 6, rel_tol=1e-4) and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0, 1)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def selu(x: Tensor, *, alpha: float = 1.6732632, gamma: float = 1.0507010) -> Tensor:
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0)))


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, 0.0)


def prelu(x: Tensor, slope: Tensor, *, opset: int = 16) -> Tensor:
    """Scale negative elements; before version 7 a vector of slopes is one of channels."""
    if opset < 7 and slope.dim() == 1 and slope.numel() > 1:
        slope = slope.reshape(-1, *[1] * (x.dim() - 2))
    return torch.where(x < 0, x * slope, x)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    require(approximate in ("none", "tanh"), f"Gelu approximates by none or tanh, got {approximate!r}")
    return F.gelu(x, approximate=approximate)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def swiglu(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    return swish(a, alpha=alpha) * b


def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0)).to(x.dtype)


def softmax_like(function: Function, x: Tensor, *, axis: int | None = None, opset: int = 13) -> Tensor:
    """Normalize over an axis; before version 13 over all dimensions from it on."""
    if opset >= 13:
        return function(x, -1 if axis is None else axis)
    axis = 1 if axis is None else axis
    axis = axis + x.dim() if axis < 0 else axis
    if axis == x.dim() - 1:
        return function(x, axis)
    return function(x.flatten(axis), axis).reshape(x.shape)


def hardmax(x: Tensor, axis: int) -> Tensor:
    """Return one where the first largest value of an axis stands, else zero."""
    places = torch.arange(x.shape[axis], device=x.device)
    places = places.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])
    return (places == x.argmax(axis, keepdim=True)).to(x.dtype)


def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    infinite = torch.isinf(x.float() if x.element_size() == 1 else x)
    if not detect_negative:
        infinite = infinite & (x.float() > 0)
    return infinite if detect_positive else infinite & (x.float() < 0)


def is_nan(x: Tensor) -> Tensor:
    return torch.isnan(x.float() if x.element_size() == 1 else x)


def where(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if x.dtype in WIDE_UNSIGNED:
        return unsigned(torch.where(condition, signed(x), signed(y)), x.dtype)
    return torch.where(condition, x, y)


def cast(x: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """Convert to another type; to floats of 8 bits with values out of range set to the largest."""
    dtype = dtype_of(to, "Cast")
    if x.is_floating_point() and not dtype.is_floating_point and dtype != torch.bool and not dtype.is_complex:
        return x.to(torch.int64).to(dtype) if dtype != torch.int64 else x.to(dtype)
    if dtype.itemsize == 1 and dtype.is_floating_point:
        return to_float8(x.float(), dtype, bool(saturate))
    return x.to(dtype)


def to_float8(x: Tensor, dtype: torch.dtype, saturate: bool) -> Tensor:
    """Round to floats of 8 bits; `saturate` sets values out of range to the largest."""
    info = torch.finfo(dtype)
    if not saturate:
        over = x.abs() > info.max + _half_step(dtype)  # of e4m3fn, which has no infinity
        return torch.where(over, torch.nan, x).to(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)
    bounded = torch.where(torch.isnan(x), x, x.clamp(info.min, info.max))
    return bounded.to(dtype)


def _half_step(dtype: torch.dtype) -> float:
    """Half the distance of the largest number to the one that would come next."""
    largest = torch.tensor(torch.finfo(dtype).max, dtype=torch.float32).to(dtype)
    before = (largest.view(torch.uint8) - 1).view(dtype)
    return (largest.float() - before.float()).item() / 2


def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    if like.dtype.itemsize == 1 and like.is_floating_point():
        return to_float8(x.float(), like.dtype, bool(saturate))
    return x.to(like.dtype)


def bit_cast(x: Tensor, *, to: int) -> Tensor:
    dtype = dtype_of(to, "BitCast")
    return x.view(torch.uint8).view(dtype) if x.dtype == torch.bool else x.view(dtype)


def dropout(
    x: Tensor,
    ratio: Number | None = None,
    training_mode: Number | None = None,
    *,
    seed: int | None = None,
    opset: int = 13,
    outputs: int = 1,
) -> Any:
    """Return x, and a mask of ones: nothing is dropped outside training."""
    trains = bool(training_mode) and ratio != 0  # without a ratio: one half
    require(not trains, "Dropout in training mode is random, which is not supported")
    mask = torch.ones_like(x, dtype=torch.bool if opset >= 10 else x.dtype)
    return x if outputs == 1 else (x, mask)


UNARY: dict[str, Callable[..., Any]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "BitwiseNot": bitwise_not, "Ceil": torch.ceil, "Cos": torch.cos,
    "Cosh": torch.cosh, "Det": torch.det, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor,
    "HardSwish": F.hardswish, "IsNaN": is_nan, "Log": torch.log, "Mish": F.mish, "Neg": torch.neg,
    "Not": torch.logical_not, "Reciprocal": torch.reciprocal, "Relu": F.relu, "Round": torch.round,
    "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus,
    "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip
# Operators of two tensors, one of which may be a number.
BINARY: dict[str, Callable[..., Any]] = {
    "Add": operator.add, "Sub": operator.sub, "Mul": operator.mul, "And": operator.and_, "Or": operator.or_,
    "Xor": operator.xor, "BitwiseAnd": operator.and_, "BitwiseOr": operator.or_, "BitwiseXor": operator.xor,
}  # fmt: skip
COMPARISONS: dict[str, Callable[..., Any]] = {
    "Equal": operator.eq,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
}
