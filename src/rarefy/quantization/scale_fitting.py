"""Grids for weights: how many units a step is. Pure functions of

    X       [B, n]   weights in blocks that share a scale
    weigh   [B, n]   how much each weight's squared error counts (the Gram matrix's diagonal), or None

Each returns the scale [B] and, for asymmetric grids, the code of zero [B]; zero is always a point of the grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rarefy.model.quant_grid import Grid

ScaleFit = Callable[[Tensor, int, bool, Tensor | None], tuple[Tensor, Tensor | None]]
SHRINKS = 40  # sizes of a grid that are tried, down to a fifth
TURNS = 20  # of the half-quadratic solver


def minmax(X: Tensor, bits: int, symmetric: bool, weigh: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The grid whose ends are the largest weights. O(n).

    >>> minmax(torch.tensor([[-1.0, 0.5, 3.0]]), 4, False)
    (tensor([0.2667]), tensor([4.]))
    """
    return _between(X.amin(1).clamp(max=0), X.amax(1).clamp(min=0), bits, symmetric)


def mse(X: Tensor, bits: int, symmetric: bool, weigh: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The grid of least squared error among `SHRINKS` whose ends lie further and further in: a few large weights are
    clipped where that makes the many small ones finer. O(SHRINKS n)."""
    low, high = X.amin(1).clamp(max=0), X.amax(1).clamp(min=0)
    best, scale, zero = _between(low, high, bits, symmetric), *_between(low, high, bits, symmetric)
    least = _error(X, bits, *best, weigh)
    for step in range(1, SHRINKS):
        share = 1 - 0.8 * step / SHRINKS
        now = _between(low * share, high * share, bits, symmetric)
        error = _error(X, bits, *now, weigh)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, now[0], scale)
        zero = None if zero is None or now[1] is None else torch.where(better, now[1], zero)
    return scale, zero


def hqq(X: Tensor, bits: int, symmetric: bool, weigh: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The grid that half-quadratic splitting finds for the error's 0.7-norm, which cares little for a few large errors
    (Badri and Shaji 2023): the scale by least squares on codes, outliers taken out by a generalized soft threshold.
    The code of zero is a whole number here, so that zeros stay. O(TURNS n)."""
    scale, zero = minmax(X, bits, symmetric)
    beta, p = 10.0, 0.7
    kept, least = (scale, zero), _error(X, bits, scale, zero, weigh)
    for _ in range(TURNS):
        c = _codes(X, bits, scale, zero)
        off = X - c * scale[:, None]
        size = off.abs()
        outliers = off.sign() * (size - (size + 1e-9).pow(p - 1) / (beta / scale[:, None].square())).clamp(min=0)
        clean = X - outliers
        scale = (c * clean).sum(1) / c.square().sum(1).clamp(min=1e-12)
        scale = torch.where(scale > 0, scale, kept[0])
        if zero is not None:
            q = c + zero[:, None]
            zero = (q - clean / scale[:, None]).mean(1).round().clamp(0, (1 << bits) - 1)
        beta *= 1.05
        error = _error(X, bits, scale, zero, weigh)
        better = error < least
        least = torch.where(better, error, least)
        kept = (
            torch.where(better, scale, kept[0]),
            None if zero is None or kept[1] is None else torch.where(better, zero, kept[1]),
        )
    return kept


FITS: dict[str, ScaleFit] = {"minmax": minmax, "mse": mse, "hqq": hqq}


def _between(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor | None]:
    tiny = torch.finfo(torch.float32).tiny
    if symmetric:
        least, most = Grid(bits, high).range
        scale = torch.maximum(high / most, low / least)
        return torch.where(scale < tiny, 1.0, scale), None
    most = (1 << bits) - 1
    scale = (high - low) / most
    scale = torch.where(scale < tiny, 1.0, scale)
    return scale, (-low / scale).round().clamp(0, most)


def _codes(X: Tensor, bits: int, scale: Tensor, zero: Tensor | None) -> Tensor:
    low, high = Grid(bits, scale, zero).range
    z = 0 if zero is None else zero[:, None]
    return (X / scale[:, None]).round_().add_(z).clamp_(low, high).sub_(z)


def _error(X: Tensor, bits: int, scale: Tensor, zero: Tensor | None, weigh: Tensor | None) -> Tensor:
    off = _codes(X, bits, scale, zero).mul_(scale[:, None]).sub_(X).square_()
    return (off if weigh is None else off.mul_(weigh)).sum(1)
