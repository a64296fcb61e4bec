"""Codes of weights in int16, rounded so that sums of products fit 32 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.common.errors import FormatError
from rarefy.runtime.packed_formats import INT16_COLUMNS, MAX_INT16_INPUTS, MAX_INT16_SUM, Dense


def int16_codes(W: Tensor, columns: int, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return W [O, C] in int16 and the scale of each output: by default the smallest with which sums of the products of
    so many columns, with inputs of 8,191 steps, fit 32 bits. O(O C).

    >>> codes, scales = int16_codes(torch.tensor([[1.0, -0.5]]), columns=2)
    >>> codes.tolist(), round(float(scales[0] * 32767), 3)
    ([[32767, -16384]], 1.0)
    """
    columns = min(columns, W.shape[1])
    if columns > MAX_INT16_INPUTS:
        raise FormatError(f"{columns} inputs leave weights in int16 few steps: at most {MAX_INT16_INPUTS}")
    if scales is None:
        magnitudes, rounding = W.abs(), columns / 2 + 1  # rounding adds at most half a step to each
        sums = torch.stack([part.sum(1) for part in magnitudes.split(columns, 1)]).amax(0)
        scales = torch.maximum(magnitudes.amax(1) / 32767, sums / (MAX_INT16_SUM - rounding))
        scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    return (W / scales[:, None]).round().clamp(-32767, 32767).to(torch.int16), scales


def check_sums(matrix: Dense, whole: bool) -> None:
    """Raise FormatError unless sums of products fit 32 bits, of whole rows or of INT16_COLUMNS of them."""
    blocks = matrix.values.view(torch.int16)  # [outputs / 16, blocks, 16, 32]
    sums = torch.stack([b.int().abs_().sum(-1) for b in blocks.unbind(1)])
    parts = sums.split(len(sums) if whole else INT16_COLUMNS // 32)
    if any(int(p.sum(0).max()) > MAX_INT16_SUM for p in parts):
        raise FormatError(f"sums of {matrix.shape[1]} int16 products do not fit 32 bits")
