"""What the units that are left can make up for: their readers learn the lost ones from them, in closed form.

h [C]     inputs of a layer that reads units, S those that stay; one dense run over the data gives E[h h'] and E[h]
B [C, S]  ridge regression of all inputs on those that stay (GRAIL, arXiv 2602.23795, section 3): h ~ B h_S
W B       the layer's weight then: what it got out of lost units it gets out of the others, as far as they tell

With the means taken off first the regression has an intercept, which goes into the layer's bias (as FLAP's does). After
that, BatchNorms take their statistics anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError
from rarefy.dependency.graph import Graph
from rarefy.dependency.symbolic_dims import Axis, kept
from rarefy.model.forward import call, evaluating, on_device
from rarefy.structured.consumers import Consumer, Moments, all_consumers

REPAIRS = ("ridge", "bias", "batchnorm")
RIDGE = 1e-3  # of the mean variance


def layers_losing_inputs(graph: Graph, masks: Mapping[Axis, Tensor]) -> list[Consumer]:
    """Return the layers that lose inputs and can be repaired: plain Linear and ungrouped convolutions."""
    some = [(r, kept(r.inputs, masks.get)) for r in all_consumers(graph) if r.plain]
    return [r for r, left in some if 0 < int(left.sum()) < len(left)]


def compensation(moments: Moments, left: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    """Return B [C, S] and the intercept [C] (zeros without), fp64: h ~ B h_S + intercept. O(C S^2).

    >>> seen = Moments.of(2)
    >>> seen.add(torch.tensor([[1.0, 2.0], [3.0, 6.0], [2.0, 4.0]]).repeat(999, 1))  # the second is twice the first
    >>> B, _ = compensation(seen, torch.tensor([True, False]), intercept=False)
    >>> [round(float(b), 2) for b in B.flatten()]
    [1.0, 2.0]
    """
    assert moments.second is not None
    n = max(moments.count, 1)
    left = left.to(moments.first.device)
    mean = moments.first / n if intercept else torch.zeros_like(moments.first)
    cov = moments.second / n - mean[:, None] * mean
    inner = cov[left][:, left]
    # with few rows the regression would learn their noise
    ridge = (RIDGE + (len(inner) / n) ** 2) * inner.diagonal().mean().clamp(min=1e-12)
    B = torch.linalg.solve(inner + ridge * torch.eye(len(inner), dtype=cov.dtype, device=cov.device), cov[left]).T
    own = torch.eye(len(left), dtype=cov.dtype, device=cov.device)[:, left]
    B[left] = own[left]  # what is still there is itself
    return B, mean - B @ mean[left]


def compensate_(
    layers: Sequence[Consumer],
    graph: Graph,
    masks: Mapping[Axis, Tensor],
    dense: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    constants: Mapping[str, Tensor],
    how: Iterable[str],
) -> list[str]:
    """Give cut layers weights that make up for lost inputs; `dense`: weights before the cut, `constants`: what their
    biases got for constant inputs. Return their names."""
    done = []
    for reader in layers:
        name, layer = reader.name, reader.module
        if name not in moments:
            continue
        left, rows = (kept(graph.dims[name][d], masks.get) for d in (reader.axis, 1 - reader.axis))
        B, shift = compensation(moments[name], left, "bias" in how and layer.bias is not None)
        W = dense[name].transpose(0, reader.axis).transpose(0, 1)[rows.to(dense[name].device)].double()
        lost = torch.einsum("oc...,cs->os...", W, B)
        with torch.no_grad():
            if "ridge" in how:
                layer.weight.copy_(lost if reader.axis else lost.transpose(0, 1))
            if layer.bias is not None and name in constants:
                layer.bias.sub_(constants[name].to(layer.bias))  # the regression has it
            if "bias" in how and layer.bias is not None:
                more = shift if "ridge" in how else _mean_of_lost(moments[name], left)
                layer.bias.add_(torch.einsum("oc...,c->o", W, more).to(layer.bias.dtype))
        done.append(name)
    return done


def _mean_of_lost(moments: Moments, left: Tensor) -> Tensor:
    mean = moments.first / max(moments.count, 1)
    return torch.where(left.to(mean.device), torch.zeros_like(mean), mean)


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """Return the BatchNorms that keep statistics, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {n: m for n, m in model.named_modules() if isinstance(m, kind) and m.running_mean is not None}


def recalibrate_batch_norms(model: nn.Module, norms: Mapping[str, Any], data: Iterable[Any]) -> None:
    """Take the running statistics of BatchNorms anew, as the mean over the data. Raises DataError for data without a
    batch, ModelError for statistics that are not finite; what undoes it is the caller's."""
    if not norms:
        return
    many = 0
    with evaluating(model), torch.no_grad(), _averaging(norms.values()):
        for batch in data:
            call(model, on_device(model, batch))
            many += 1
    if not many:
        raise DataError("the data gave no batch: BatchNorms need some for their statistics")
    wrong = next((n for n, m in norms.items() if not all(torch.isfinite(b).all() for b in m.buffers())), None)
    if wrong is not None:
        raise ModelError(f"{wrong}: its statistics are not finite on this data: NaN or inf in inputs or weights")


@contextmanager
def _averaging(norms: Iterable[Any]) -> Any:
    """Have BatchNorms average over all batches that they see."""
    before = [(m, m.momentum) for m in norms]
    try:
        for m, _ in before:
            m.reset_running_stats()
            m.momentum, m.training = None, True
        yield
    finally:
        for m, momentum in before:
            m.momentum = momentum
