"""Matrix products with matrices that are computed."""

from __future__ import annotations

import torch
from torch import Tensor


def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0,
    transB: int = 0,
) -> Tensor:  # fmt: skip
    product = (a.T if transA else a) @ (b.T if transB else b)
    product = product if alpha == 1 else product * alpha
    if c is None:
        return product.to(a.dtype)
    return (product + (c if beta == 1 else c * beta)).to(a.dtype)


def fused_matmul(
    a: Tensor, b: Tensor, *, alpha: float = 1.0, transA: int = 0, transB: int = 0, transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:  # fmt: skip
    """Multiply matrices that are transposed before, as ONNX Runtime fuses it."""
    a = _batch_last(a) if transBatchA else a
    b = _batch_last(b) if transBatchB else b
    a, b = (x.transpose(-1, -2) if turned and x.dim() > 1 else x for x, turned in ((a, transA), (b, transB)))
    product = torch.matmul(a, b)
    return product if alpha == 1 else product * alpha


def _batch_last(x: Tensor) -> Tensor:
    """Return the first axis moved before the last."""
    return x.movedim(0, -2)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x + bias)


def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.gelu(x if bias is None else x + bias, approximate="tanh")


def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return x * torch.sigmoid(alpha * x)
