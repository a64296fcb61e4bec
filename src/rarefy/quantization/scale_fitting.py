"""Scale fitting: the step of a quantization grid. Pure functions of

X       [B, n]   weights in blocks that share a scale
weigh   [B, n]   weight of each squared error (the diagonal of the Gram matrix), or None

Each returns the scale [B] and, for asymmetric grids, the zero point [B]. Zero is always a point of the grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rarefy.model.quant_grid import Grid
from rarefy.runtime import bindings

ScaleFit = Callable[[Tensor, int, bool, Tensor | None], tuple[Tensor, Tensor | None]]
NUM_RANGES = 40  # ranges that `mse` tries, down to a fifth of the largest
FRACTIONS = tuple(1 - 0.8 * step / NUM_RANGES for step in range(1, NUM_RANGES))  # of the largest range
MAX_NATIVE_BLOCK = 1 << 16  # weights that share a scale: eight blocks are copied for native code
HQQ_ITERATIONS = 20


def minmax(X: Tensor, bits: int, symmetric: bool, weigh: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the grid whose ends are the largest weights. O(n).

    >>> minmax(torch.tensor([[-1.0, 0.5, 3.0]]), 4, False)
    (tensor([0.2667]), tensor([4.]))
    """
    return _grid_of_range(X.amin(1).clamp(max=0), X.amax(1).clamp(min=0), bits, symmetric)


def mse(X: Tensor, bits: int, symmetric: bool, weigh: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the grid of least squared error among `NUM_RANGES` with ever smaller ranges. O(NUM_RANGES n).

    A few large weights are clipped where that makes the step of the many small ones finer. In native code, which takes
    about a tenth of the time, where it is installed and the weights are in fp32 on the CPU.
    """
    suited = X.device.type == "cpu" and X.dtype == torch.float32 and X.numel() and X.shape[1] <= MAX_NATIVE_BLOCK
    if suited and bindings.missing() is None:
        return _native_mse(X, bits, symmetric, weigh)
    return mse_in_torch(X, bits, symmetric, weigh)


def _native_mse(X: Tensor, bits: int, symmetric: bool, weigh: Tensor | None) -> tuple[Tensor, Tensor | None]:
    scale = X.new_empty(len(X))
    zero = None if symmetric else X.new_empty(len(X))
    min_code, max_code = Grid(bits, scale, zero).range
    X, weigh = X.contiguous(), None if weigh is None else weigh.float().expand(X.shape).contiguous()
    fractions = X.new_tensor(FRACTIONS)
    x, w, f, s, z = (None if t is None else t.data_ptr() for t in (X, weigh, fractions, scale, zero))
    fit = bindings.ScaleFit(x, w, *X.shape, f, len(FRACTIONS), min_code, max_code, int(symmetric), s, z)
    if bindings.library().rarefy_fit_scales(fit):
        raise MemoryError(f"no memory to fit {len(X)} scales of {bits} bits")
    return scale, zero


def mse_in_torch(X: Tensor, bits: int, symmetric: bool, weigh: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return what `mse` does, or a grid with as small an error, on any device and without native code.

    O(NUM_RANGES n).
    """
    low, high = X.amin(1).clamp(max=0), X.amax(1).clamp(min=0)
    best, scale, zero = _grid_of_range(low, high, bits, symmetric), *_grid_of_range(low, high, bits, symmetric)
    min_error = _squared_error(X, bits, *best, weigh)
    for fraction in FRACTIONS:
        candidate = _grid_of_range(low * fraction, high * fraction, bits, symmetric)
        error = _squared_error(X, bits, *candidate, weigh)
        better = error < min_error
        min_error = torch.where(better, error, min_error)
        scale = torch.where(better, candidate[0], scale)
        zero = None if zero is None or candidate[1] is None else torch.where(better, candidate[1], zero)
    return scale, zero


def hqq(X: Tensor, bits: int, symmetric: bool, weigh: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the grid that half-quadratic splitting finds for the 0.7-norm of the error. O(HQQ_ITERATIONS n).

    The norm is insensitive to a few large errors (HQQ; Badri and Shaji 2023). The scale is fitted by least squares on
    the codes, with outliers removed by a generalized soft threshold. The zero point is rounded, so that zeros stay
    zero.
    """
    scale, zero = minmax(X, bits, symmetric)
    beta, p = 10.0, 0.7
    best, min_error = (scale, zero), _squared_error(X, bits, scale, zero, weigh)
    for _ in range(HQQ_ITERATIONS):
        codes = _quantize(X, bits, scale, zero)
        residual = X - codes * scale[:, None]
        magnitude = residual.abs()
        threshold = (magnitude + 1e-9).pow(p - 1) / (beta / scale[:, None].square())
        outliers = residual.sign() * (magnitude - threshold).clamp(min=0)
        clean = X - outliers
        scale = (codes * clean).sum(1) / codes.square().sum(1).clamp(min=1e-12)
        scale = torch.where(scale > 0, scale, best[0])
        if zero is not None:
            q = codes + zero[:, None]
            zero = (q - clean / scale[:, None]).mean(1).round().clamp(0, (1 << bits) - 1)
        beta *= 1.05
        error = _squared_error(X, bits, scale, zero, weigh)
        better = error < min_error
        min_error = torch.where(better, error, min_error)
        best = (
            torch.where(better, scale, best[0]),
            None if zero is None or best[1] is None else torch.where(better, zero, best[1]),
        )
    return best


FITS: dict[str, ScaleFit] = {"minmax": minmax, "mse": mse, "hqq": hqq}


def _grid_of_range(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    """Return the scale and zero point of a grid from `low` to `high`."""
    tiny = torch.finfo(torch.float32).tiny
    if symmetric:
        min_code, max_code = Grid(bits, high).range
        scale = torch.maximum(high / max_code, low / min_code)
        return torch.where(scale < tiny, 1.0, scale), None
    max_code = (1 << bits) - 1
    scale = (high - low) / max_code
    scale = torch.where(scale < tiny, 1.0, scale)
    return scale, (-low / scale).round().clamp(0, max_code)


def _quantize(X: Tensor, bits: int, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Return the codes of X, less the zero point."""
    low, high = Grid(bits, scale, zero).range
    z = 0 if zero is None else zero[:, None]
    return (X / scale[:, None]).round_().add_(z).clamp_(low, high).sub_(z)


def _squared_error(X: Tensor, bits: int, scale: Tensor, zero: Tensor | None, weigh: Tensor | None) -> Tensor:
    """Return the weighted squared error of each block."""
    error = _quantize(X, bits, scale, zero).mul_(scale[:, None]).sub_(X).square_()
    return (error if weigh is None else error.mul_(weigh)).sum(1)
