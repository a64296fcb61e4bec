"""Winograd's algorithm F(2x2, 3x3) for 3 x 3 convolutions with few zeros: 16 products instead of 36 for each tile
of 2 x 2 outputs (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016, section 4.1). Runs in
programs only.

Rounding errors are 1e-7 of the largest input of a tile, not of each output. With an infinite input, outputs may be NaN.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch
from torch import Tensor

from rarefy.runtime.nhwc_weights import NhwcWeight, pack_winograd
from rarefy.runtime.packed_formats import ConvTiles
from rarefy.runtime.packing import unpack

G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
_LOCK = Lock()
MIN_TILES = 32  # tiles of an image, from which the larger weights pay off


def fits(shape: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], sizes: tuple[Any, ...]) -> bool:
    """Return whether a convolution can use Winograd's algorithm for outputs of `sizes` (rows, columns). The number of
    images does not matter, so an image's outputs do not depend on the rest of the batch."""
    plain = (*shape[2:], *stride, *dilation) == (3, 3, 1, 1, 1, 1)
    known = len(sizes) == 2 and all(isinstance(n, int) for n in sizes)
    return plain and known and -(-sizes[0] // 2) * -(-sizes[1] // 2) >= MIN_TILES


def is_used(packed: ConvTiles, sizes: tuple[int, ...]) -> bool:
    """Return whether a packed convolution uses Winograd's algorithm for outputs of `sizes`: dense fp32 does."""
    return packed.counts is None and packed.kind == "fp32" and fits(packed.shape, packed.stride, packed.dilation, sizes)


def transform(weight: Tensor) -> Tensor:
    """Return G w G^T of W [O, I, 3, 3] as fp32 [16, O, I]. O(O I).

    >>> transform(torch.ones(1, 1, 3, 3))[:, 0, 0].tolist()[:8]
    [1.0, 1.5, 0.5, 1.0, 1.5, 2.25, 0.75, 1.5]
    """
    g = torch.tensor(G, dtype=torch.float64)
    return torch.einsum("ia,ocab,jb->ijoc", g, weight.double(), g).flatten(0, 1).float()


def weight_of(kernel: Any) -> NhwcWeight:
    """Return a convolution's transformed weight, 16/9 as large as the packed one, computed once by whichever thread
    comes first. O(weights)."""
    with _LOCK:
        kernel.winograd = kernel.winograd or pack_winograd(transform(unpack(kernel.held[0])))
        return kernel.winograd
