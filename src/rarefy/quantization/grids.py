"""Quantization grids of whole weights."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.common.errors import ModelError
from rarefy.model.layers import Layer
from rarefy.model.quant_grid import Grid, block_rows
from rarefy.quantization.config import QuantizeConfig
from rarefy.quantization.scale_fitting import FITS, ScaleFit

CHUNK = 1 << 17  # weights whose scales are fitted together: what a fit computes on the way stays in the CPU's cache


def fit_grid(weight: Tensor, shape: tuple[int, ...], config: QuantizeConfig, weigh: Tensor | None = None) -> Grid:
    """Return the grid of a weight in its stored shape; `weigh`, of the same shape, weights the squared errors."""
    scale, zero = fit_scales(
        FITS[config.fit], block_rows(weight.float(), shape), config, None if weigh is None else block_rows(weigh, shape)
    )
    return Grid(config.bits, scale.reshape(shape), None if zero is None else zero.reshape(shape))


def fit_scales(
    fit: ScaleFit, X: Tensor, config: QuantizeConfig, weigh: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the scales as they are stored, and the zero points in uint8.

    Scales of input groups are stored in bf16. That costs no accuracy, since codes are computed with the stored scale.
    """
    rows = max(1, CHUNK // max(1, X.shape[1]))
    parts = [
        fit(X[i : i + rows], config.bits, config.symmetric, None if weigh is None else weigh[i : i + rows])
        for i in range(0, max(1, len(X)), rows)
    ]
    scale = torch.cat([scale for scale, _ in parts])
    zeros = [zero for _, zero in parts if zero is not None]
    zero = torch.cat(zeros) if zeros else None
    scale = scale.bfloat16() if isinstance(config.group, int) else scale
    return scale, None if zero is None else zero.to(torch.uint8)


def check_finite(layer: Layer, grid: Grid, values: Tensor) -> Tensor:
    """Return the rounded weights. Raises ModelError where they or their scales overflow the weight's dtype."""
    if not (torch.isfinite(grid.scale).all() and torch.isfinite(values).all()):
        max_weight = float(layer.weight.detach().abs().max())
        raise ModelError(f"{layer.full_name} has weights up to {max_weight:g}, whose scales overflow {values.dtype}")
    return values
