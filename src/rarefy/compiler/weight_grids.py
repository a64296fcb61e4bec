"""Whether a weight already lies on an int8 grid: each output's weights are whole multiples of one number."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.model.quant_grid import Grid

MAX_CODE = 127
TOLERANCE = 1e-3  # distance of a weight from its code: what fp32 rounds where passes multiply weights by a number
SAMPLE = 64  # largest weights of an output, which rule out most scales


def int8_grid(weight: Tensor) -> Grid | None:
    """Return the grid of a weight [outputs, ..], a scale [outputs, 1] for each output; None where it has none.

    It does not matter how the weight got there, nor what passes have multiplied its outputs by since. An output of
    zeros has any scale. O(weights), and up to 127 times that for outputs without a code of 127.

    >>> int8_grid(torch.tensor([[0.5, -1.5, 63.5], [0.0, 0.0, 0.0]])).scale.tolist()
    [[0.5], [1.0]]
    >>> int8_grid(torch.tensor([[0.5, 0.12345, 63.5]])) is None
    True
    """
    W = weight.detach().float().flatten(1).abs()
    largest = W.amax(1)
    sample = W.topk(min(SAMPLE, W.shape[1]), 1).values
    scale = (largest <= 0).float()
    for code in range(MAX_CODE, 0, -1):
        rows = (scale == 0).nonzero().flatten()
        if not len(rows):
            break
        step = largest[rows] / code
        fits = _on_grid(sample[rows], step)
        rows, step = rows[fits], step[fits]
        fits = _on_grid(W[rows], step)
        scale[rows[fits]] = step[fits]
    return Grid(8, scale[:, None]) if bool((scale > 0).all()) else None


def grid_of_largest(weight: Tensor) -> Grid:
    """Return an int8 grid for a weight [outputs, inputs] on which the largest weight of each output has the code 127.

    >>> grid_of_largest(torch.tensor([[0.5, -63.5], [0.0, 0.0]])).scale.tolist()
    [[0.5], [1.0]]
    """
    scale = weight.float().abs().amax(1, keepdim=True) / MAX_CODE
    return Grid(8, torch.where(scale > 0, scale, 1.0))


def _on_grid(W: Tensor, step: Tensor) -> Tensor:
    """Return for each row whether all weights are whole multiples of its step."""
    codes = W / step[:, None]
    return ((codes - codes.round()).abs() <= TOLERANCE).all(1)
