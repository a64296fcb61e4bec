"""Static 8-bit grids of activations: one scale and one zero point from sampled values."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.model.activation_quant import ActivationQuant

OBSERVERS = ("minmax", "percentile", "mse")
SAMPLES = 1 << 16  # values sampled from a batch, at most
KEPT = 1 << 20  # values sampled from all batches, at most; torch.quantile takes 2^24
TAIL = 1e-4  # fraction that `percentile` clips at each end
NUM_RANGES = 30  # that `mse` tries
MIN_RANGE = 0.5  # of them: large values are rare, and often what a model looks for


class Sample:
    """A random sample of the values of many batches, at most KEPT of them, with their minimum and maximum.

    Of each batch there are equally many, or all of a smaller one. Memory: 4 KEPT bytes.
    """

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.per_batch = SAMPLES  # values of a batch, at most
        self.low = torch.tensor([torch.inf], dtype=torch.float32)
        self.high = -self.low

    def add(self, x: Tensor, rng: torch.Generator) -> None:
        """Add values of a batch."""
        x = x.detach().float().flatten()
        drawn = torch.randint(len(x), (min(len(x), self.per_batch),), generator=rng)
        self.parts.append(x[drawn.to(x.device)].cpu())
        self.low, self.high = torch.minimum(self.low, x.min().cpu()), torch.maximum(self.high, x.max().cpu())
        while sum(map(len, self.parts)) > KEPT and self.per_batch > 1:
            self.per_batch = max(1, min(self.per_batch, max(map(len, self.parts))) // 2)
            self.parts = [part[: self.per_batch].clone() for part in self.parts]  # drawn in random order

    def values(self) -> Tensor:
        """Return the sampled values, the minimum and the maximum."""
        return torch.cat([*self.parts, self.low, self.high])


def static_grid(x: Tensor, observer: str) -> ActivationQuant:
    """Return the 8-bit grid for values like x; zero is one of its points.

    >>> static_grid(torch.tensor([0.0, 2.55]), "minmax")
    ActivationQuant(bits=8, scale=0.00999..., zero=0)
    """
    low, high = float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
    if observer == "percentile":
        ends = torch.quantile(x.double(), torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64))
        low, high = min(0.0, float(ends[0])), max(0.0, float(ends[1]))
    if observer != "mse":
        return _grid_of_range(low, high)
    shares = (1 - (1 - MIN_RANGE) * i / NUM_RANGES for i in range(NUM_RANGES))
    candidates = [_grid_of_range(low * s, high * s) for s in shares]
    return min(candidates, key=lambda g: float((g(x) - x).square().sum()))


def _grid_of_range(low: float, high: float) -> ActivationQuant:
    """Return the 8-bit grid from `low` to `high`."""
    scale = (high - low) / 255
    scale = scale if scale > 1e-30 else 1.0
    return ActivationQuant(8, scale, min(255, max(0, round(-low / scale))))
