"""Operators of torch that do not check their arguments, and functions that do, which graphs of files call instead.

torch reads beyond the end of vectors that are shorter than the channels, and a size that exceeds 32 bits makes it write
elsewhere. Graphs that were exported never have such arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
MAX_PIXELS = 1 << 20  # of a window, its steps, its padding and its output: kernels multiply two of them in 64 bits


def batch_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
    momentum: float, eps: float,
) -> Any:  # fmt: skip
    """Return what torch's operator for a BatchNorm in evaluation mode returns."""
    _check_channels(input, weight, bias, running_mean, running_var)
    return aten._native_batch_norm_legit_no_training.default(
        input, weight, bias, running_mean, running_var, momentum, eps
    )


def batch_norm_without_statistics(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, training: bool, momentum: float, eps: float
) -> Any:
    """Return what torch's operator for a BatchNorm by the statistics of its input returns."""
    _check_channels(input, weight, bias)
    return aten._native_batch_norm_legit.no_stats(input, weight, bias, training, momentum, eps)


def _check_channels(x: Tensor, *vectors: Tensor | None) -> None:
    wrong = next((v for v in vectors if v is not None and (x.dim() < 2 or tuple(v.shape) != x.shape[1:2])), None)
    if x.dim() < 2 or wrong is not None:
        got = "" if wrong is None else f" with a vector {list(wrong.shape)}"
        raise RuntimeError(f"expected [batch, channels, ..] and vectors [channels], got {list(x.shape)}{got}")


def _padding(operator: Any) -> Callable[[Tensor, Sequence[int]], Tensor]:
    def pad(self: Tensor, padding: Sequence[int]) -> Tensor:
        if any(abs(n) > MAX_PIXELS for n in padding):
            raise RuntimeError(f"padding: expected at most {MAX_PIXELS:,} pixels, got {list(padding)}")
        return operator(self, padding)

    return pad


CHECKED: dict[Any, Callable[..., Any]] = {
    aten._native_batch_norm_legit_no_training.default: batch_norm,
    aten._native_batch_norm_legit.no_stats: batch_norm_without_statistics,
    **{
        operator: _padding(operator)
        for packet in (aten.reflection_pad1d, aten.reflection_pad2d, aten.replication_pad1d, aten.replication_pad2d)
        for operator in [packet.default]
    },
}
UNCHECKED = {function: operator for operator, function in CHECKED.items()}
