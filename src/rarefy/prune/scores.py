"""Scores: how much each weight matters. f(W, stats) -> score; the smallest are pruned first.

    W      [G, K, O, I]  weight as `rarefy.model.layout` views it
    stats  calibration statistics that broadcast to the same shape (`rarefy.calibration.statistics`)

A new score is one function here and one line in SCORES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.calibration.statistics import LayerStats


def magnitude(W: Tensor, stats: LayerStats) -> Tensor:
    """Return |w| (LeCun 1989 to Han 2015). Its mean over a unit is the L1 norm."""
    return W.abs()


def l2(W: Tensor, stats: LayerStats) -> Tensor:
    """Return w^2, which ranks single weights as magnitude does; the squared L2 norm of blocks, rows and columns."""
    return W.square()


def lamp(W: Tensor, stats: LayerStats) -> Tensor:
    """Return w_i^2 / sum of w_j^2 over all weights of the layer with |w_j| >= |w_i| (LAMP, Lee 2021, eq. 3).

    O(n log n). The relative error of a layer that has already lost its smaller weights; comparable between layers.
    """
    order = W.abs().flatten().argsort(stable=True)
    squared = W.double().square().flatten()[order]
    remaining = squared.flip(0).cumsum(0).flip(0)
    return torch.empty_like(squared).scatter_(0, order, squared / remaining.clamp(min=1e-300)).float().view(W.shape)


def random(W: Tensor, stats: LayerStats) -> Tensor:
    """Return uniform noise from the layer's seeded generator: the baseline of every score."""
    return torch.rand(W.shape, generator=stats.generator).to(W.device)


def gradient(W: Tensor, stats: LayerStats) -> Tensor:
    """Return the mean absolute gradient E|g|: how sensitive the loss is to each weight."""
    return stats.gradient


def taylor(W: Tensor, stats: LayerStats) -> Tensor:
    """Return |w| E|g|: the first-order change of the loss when w is set to 0 (Molchanov 2017, eq. 8, for weights)."""
    return W.abs() * stats.gradient


def fisher(W: Tensor, stats: LayerStats) -> Tensor:
    """Return w^2 E[g^2] (Theis 2018, eq. 7; Optimal Brain Damage with the diagonal of the empirical Fisher matrix)."""
    return W.square() * stats.fisher


def activation(W: Tensor, stats: LayerStats) -> Tensor:
    """Return ||x_j|| ||y_i||, the activity at both ends of w_ij; rows rank by output (Hu 2016), columns by input."""
    return (stats.in_norm * stats.out_norm).expand(W.shape)


def wanda(W: Tensor, stats: LayerStats) -> Tensor:
    """Return |w_ij| ||x_j|| (Sun 2024, Wanda, eq. 1)."""
    return W.abs() * stats.in_norm


def ria(W: Tensor, stats: LayerStats) -> Tensor:
    """Return (|w_ij| / sum of its row + |w_ij| / sum of its column) ||x_j||^0.5 (Zhang 2024, RIA, eq. 5)."""
    A = W.abs()
    rows, columns = A.sum((1, 3), keepdim=True), A.sum(2, keepdim=True)
    return (A / rows.clamp(min=1e-30) + A / columns.clamp(min=1e-30)) * stats.in_norm.sqrt()


@dataclass(frozen=True)
class Score:
    """A score function, the statistics it needs, and the scope in which its paper compares weights."""

    of: Callable[[Tensor, LayerStats], Tensor]
    needs: frozenset[str] = frozenset()
    scope: str = "layer"


SCORES = {
    "magnitude": Score(magnitude),
    "l2": Score(l2),
    "lamp": Score(lamp, scope="global"),
    "random": Score(random),
    "gradient": Score(gradient, frozenset({"gradient"})),
    "taylor": Score(taylor, frozenset({"gradient"})),
    "fisher": Score(fisher, frozenset({"gradient"})),
    "activation": Score(activation, frozenset({"input", "output"})),
    "wanda": Score(wanda, frozenset({"input"}), scope="row"),
    "ria": Score(ria, frozenset({"input"}), scope="row"),
}
