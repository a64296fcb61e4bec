"""Compensate for removed units: update the weights of their consumers in closed form.

h [C]     inputs of a consumer, S those that stay; one pass of the dense model over the data gives E[h h'] and E[h]
B [C, S]  ridge regression of all inputs on those that stay (GRAIL, arXiv 2602.23795, section 3): h ~ B h_S
W B       the new weight: it replaces the contribution of removed units by that of the remaining ones

With the means subtracted first, the regression has an intercept that is added to the bias (as in FLAP).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rarefy.dependency.graph import Graph
from rarefy.dependency.symbolic_dims import Axis, kept_mask
from rarefy.structured.consumers import Consumer, Moments, all_consumers

REPAIRS = ("ridge", "bias", "batchnorm")
RIDGE = 1e-3  # times the mean variance of the inputs that stay


def layers_losing_inputs(graph: Graph, masks: Mapping[Axis, Tensor]) -> list[Consumer]:
    """Return the consumers that lose some inputs and can be compensated: Linear and ungrouped convolutions."""
    masked = [(consumer, kept_mask(consumer.inputs, masks.get)) for consumer in all_consumers(graph) if consumer.plain]
    return [consumer for consumer, mask in masked if 0 < int(mask.sum()) < len(mask)]


def compensation(moments: Moments, keep: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    """Return B [C, S] and the intercept [C] (zeros without `intercept`), fp64: h ~ B h_S + intercept. O(C S^2).

    `keep`, bool [C], says which inputs stay.

    >>> moments = Moments.of(2)
    >>> moments.add(torch.tensor([[1.0, 2.0], [3.0, 6.0], [2.0, 4.0]]).repeat(999, 1))  # the second is twice the first
    >>> B, _ = compensation(moments, torch.tensor([True, False]), intercept=False)
    >>> [round(float(b), 2) for b in B.flatten()]
    [1.0, 2.0]
    """
    assert moments.second is not None
    n = max(moments.count, 1)
    keep = keep.to(moments.first.device)
    mean = moments.first / n if intercept else torch.zeros_like(moments.first)
    cov = moments.second / n - mean[:, None] * mean
    cov_kept = cov[keep][:, keep]
    # with few rows the regression would fit their noise
    ridge = (RIDGE + (len(cov_kept) / n) ** 2) * cov_kept.diagonal().mean().clamp(min=1e-12)
    B = torch.linalg.solve(cov_kept + ridge * torch.eye(len(cov_kept), dtype=cov.dtype, device=cov.device), cov[keep]).T
    identity = torch.eye(len(keep), dtype=cov.dtype, device=cov.device)[:, keep]
    B[keep] = identity[keep]  # an input that stays predicts itself
    return B, mean - B @ mean[keep]


def compensate_(
    layers: Sequence[Consumer],
    graph: Graph,
    masks: Mapping[Axis, Tensor],
    dense: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    constants: Mapping[str, Tensor],
    methods: Iterable[str],
) -> list[str]:
    """Write compensated weights into the cut layers, in place; return the names of these layers.

    dense      weights before the cut
    moments    moments of the layers' inputs before the cut
    constants  what the cut added to biases for constant inputs: the regression accounts for it, so it is taken off
    methods    of REPAIRS
    """
    names = []
    for consumer in layers:
        name, layer = consumer.name, consumer.module
        if name not in moments:
            continue
        keep, rows = (kept_mask(graph.dims[name][d], masks.get) for d in (consumer.axis, 1 - consumer.axis))
        B, shift = compensation(moments[name], keep, "bias" in methods and layer.bias is not None)
        W = dense[name].transpose(0, consumer.axis).transpose(0, 1)[rows.to(dense[name].device)].double()
        compensated = torch.einsum("oc...,cs->os...", W, B)
        with torch.no_grad():
            if "ridge" in methods:
                layer.weight.copy_(compensated if consumer.axis else compensated.transpose(0, 1))
            if layer.bias is not None and name in constants:
                layer.bias.sub_(constants[name].to(layer.bias))  # the intercept includes it
            if "bias" in methods and layer.bias is not None:
                offset = shift if "ridge" in methods else _mean_of_removed(moments[name], keep)
                layer.bias.add_(torch.einsum("oc...,c->o", W, offset).to(layer.bias.dtype))
        names.append(name)
    return names


def _mean_of_removed(moments: Moments, keep: Tensor) -> Tensor:
    """Return the mean input [C], zero for inputs that stay."""
    mean = moments.first / max(moments.count, 1)
    return torch.where(keep.to(mean.device), torch.zeros_like(mean), mean)
