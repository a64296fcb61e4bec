"""Convolutions of 3 x 3 with few zeros by squares of two by two outputs, 16 products in the place of 36: F(2x2, 3x3) of
Winograd, in plans alone (Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, 2016, section 4.1).

Outputs are as exact as the largest inputs of their square allow, not their own: rounding is 1e-7 of those. Where an
input is infinite, they may be NaN.
"""

from __future__ import annotations

from ctypes import c_int64
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from rarefy.runtime import bindings
from rarefy.runtime.huge_pages import fresh
from rarefy.runtime.packed_formats import ConvTiles
from rarefy.runtime.packing import pack_dense, unpack

G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
MAKING = Lock()
LEAST = 32  # squares of an image from which they are worth their larger weights


def fit(shape: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], sizes: tuple[Any, ...]) -> bool:
    """Return whether a convolution of that weight makes its outputs, rows and columns of `sizes`, by squares: whatever
    the number of images, so that an image's outputs do not depend on those beside it."""
    plain = (*shape[2:], *stride, *dilation) == (3, 3, 1, 1, 1, 1)
    known = len(sizes) == 2 and all(isinstance(n, int) for n in sizes)
    return plain and known and -(-sizes[0] // 2) * -(-sizes[1] // 2) >= LEAST


def worth(packed: ConvTiles, sizes: tuple[int, ...]) -> bool:
    """Return whether outputs of those sizes are made by squares: of a weight packed with its zeros."""
    return packed.counts is None and fit(packed.shape, packed.stride, packed.dilation, sizes)


def transformed(weight: Tensor) -> Tensor:
    """Return G w G^T of W [O, I, 3, 3] as fp32 [16, O / 4, I, 4], the outputs padded to fours. O(O I).

    >>> transformed(torch.ones(1, 1, 3, 3))[:, 0, 0, 0].tolist()[:8]
    [1.0, 1.5, 0.5, 1.0, 1.5, 2.25, 0.75, 1.5]
    """
    g = torch.tensor(G, dtype=torch.float64)
    moved = torch.einsum("ia,ocab,jb->ijoc", g, weight.double(), g).flatten(0, 1)
    return torch.stack([pack_dense(place.float()).values for place in moved])


class Squares:
    """A convolution's weights for squares of outputs, beside the packed one and 16/9 as large, and how a plan reads its
    images: four by four, two apart."""

    def __init__(self, kernel: Any):
        form = kernel.held[0]
        moved = transformed(unpack(form))
        self.values = fresh(moved.nbytes).view(torch.float32).view(moved.shape).copy_(moved)
        pairs: dict[str, Any] = {"kernel": (4, 4), "stride": (2, 2), "padding": form.padding, "dilation": (1, 1)}
        old, arrays = kernel.about, {n: (c_int64 * 2)(*v) for n, v in pairs.items()}
        self.about = bindings.Conv(
            weight=old.weight, dense=self.values.data_ptr(), groups=1, outputs=old.outputs, inputs=old.inputs, **arrays
        )


def of(kernel: Any) -> Squares:
    """Return a convolution's squares, made once, whichever thread comes first. O(weights)."""
    with MAKING:
        kernel.squares = kernel.squares or Squares(kernel)
        return kernel.squares
