"""How far two tensors are apart: the one definition that every check of outputs uses, each with its own tolerance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 1 << 20  # elements that are compared at once, so that copies in fp64 stay small


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
        return int((result != expected).count_nonzero()) / expected.numel()
    dtype = torch.complex128 if expected.is_complex() else torch.float64
    norms = []
    for parts in zip(*(t.detach().reshape(-1).split(CHUNK) for t in (result, expected))):
        a, b = (t.to("cpu", dtype) for t in parts)
        finite = b.isfinite()
        if not bool(((a == b) | (a.isnan() & b.isnan()))[~finite].all()):
            return math.inf
        a, b = a[finite], b[finite]
        if not bool(a.isfinite().all()):
            return math.inf
        if len(b):
            norms.append([float((a - b).norm(p=norm)), float(b.norm(p=norm))])
    if not norms:
        return 0.0
    distance, length = torch.tensor(norms, dtype=torch.float64).norm(p=norm, dim=0).tolist()
    return distance / (max(length, floor) or 1.0)
