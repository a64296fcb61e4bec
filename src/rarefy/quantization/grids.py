"""TODO."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.common.errors import ModelError
from rarefy.model.layers import Layer
from rarefy.model.quant_grid import Grid, rows_of
from rarefy.quantization.config import Ask
from rarefy.quantization.scale_fitting import FITS, ScaleFit


def fit_grid(weight: Tensor, shape: tuple[int, ...], ask: Ask, weigh: Tensor | None = None) -> Grid:
    """Return the grid of a weight as stored; `weigh`, of the same shape, is what each squared error counts."""
    scale, zero = fit_scales(
        FITS[ask.fit], rows_of(weight.float(), shape), ask, None if weigh is None else rows_of(weigh, shape)
    )
    return Grid(ask.bits, scale.reshape(shape), None if zero is None else zero.reshape(shape))


def fit_scales(fit: ScaleFit, X: Tensor, ask: Ask, weigh: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Return scales as they are stored (of groups in bf16, which costs no accuracy: codes go by the scale as it is)
    and codes of zero, uint8."""
    scale, zero = fit(X, ask.bits, ask.symmetric, weigh)
    scale = scale.bfloat16() if isinstance(ask.group, int) else scale
    return scale, None if zero is None else zero.to(torch.uint8)


def check_finite(layer: Layer, grid: Grid, values: Tensor) -> Tensor:
    """Return rounded weights; ModelError where they, or their scales, are beyond the numbers of the weight."""
    if not (torch.isfinite(grid.scale).all() and torch.isfinite(values).all()):
        most = float(layer.weight.detach().abs().max())
        raise ModelError(f"{layer.full_name} has weights of {most:g}, for which there is no grid in {values.dtype}")
    return values
