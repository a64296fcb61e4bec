"""How far two tensors are apart: the one definition that every check of outputs uses, each with its own tolerance."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_distance(result: Tensor, expected: Tensor, *, norm: float = 2, floor: float = 0.0) -> float:
    """Return ||result - expected|| / ||expected||, computed in fp64.

    Args:
        result: a tensor of any shape.
        expected: what it should be.
        norm: 2 for the Euclidean norm, `math.inf` for the largest entry.
        floor: smallest divisor. Without one, an expected tensor of zeros is compared absolutely.

    Returns:
        The distance; for integers and booleans the share of entries that differ; infinity where shapes differ, or
        where one tensor has an infinity or NaN that the other has not.

    Example:
        >>> relative_distance(torch.tensor([3.0, 4.1]), torch.tensor([3.0, 4.0])) < 0.021
        True
        >>> relative_distance(torch.tensor([1, 2]), torch.tensor([1, 3]))
        0.5
    """
    if result.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    if not expected.is_floating_point() and not expected.is_complex():
        return float((result != expected).double().mean())
    dtype = torch.complex128 if expected.is_complex() else torch.float64
    a, b = (t.detach().to("cpu", dtype).flatten() for t in (result, expected))
    finite = b.isfinite()
    if not bool(((a == b) | (a.isnan() & b.isnan()))[~finite].all()):
        return math.inf
    a, b = a[finite], b[finite]
    if not bool(a.isfinite().all()):
        return math.inf
    if not len(b):
        return 0.0
    length = max(float(b.norm(p=norm)), floor)
    return float((a - b).norm(p=norm)) / (length or 1.0)
