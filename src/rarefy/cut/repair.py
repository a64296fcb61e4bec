"""What the units that are left can make up for: their readers learn the lost ones from them, in closed form.

h [C]     inputs of a layer that reads units, S those that stay; one dense run over the data gives E[h h'] and E[h]
B [C, S]  ridge regression of all inputs on those that stay (GRAIL, arXiv 2602.23795, section 3): h ~ B h_S
W B       the layer's weight then: what it got out of lost units it gets out of the others, as far as they tell

With the means taken off first the regression has an intercept, which goes into the layer's bias (as FLAP's does). After
that, BatchNorms take their statistics anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.model.axes import Axis, kept
from rarefy.model.graph import Graph
from rarefy.model.stats import call, evaluating, on_device

REPAIRS = ("ridge", "bias", "batchnorm")
RIDGE = 1e-3  # of the mean variance
READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(eq=False)
class Moments:
    """Sums over the data of the inputs of a layer: how many, h [C], h h' [C, C], fp64."""

    count: int
    first: Tensor
    second: Tensor

    def add(self, x: Tensor) -> None:
        self.count += len(x)
        self.first += x.sum(0, dtype=torch.float64)
        self.second += (x.T @ x).double()


def readers(model: nn.Module, graph: Graph, masks: Mapping[Axis, Tensor]) -> dict[str, nn.Module]:
    """Return the layers that lose inputs, by the name of their weight: plain Linear and ungrouped convolutions."""
    found = {}
    for name, owners in graph.owners.items():
        module: Any = owners[0][0]
        fits = len(owners) == 1 and owners[0][1] == "weight" and type(module) in READERS
        if fits and getattr(module, "groups", 1) == 1:
            left = kept(graph.dims[name][1], masks.get)
            if 0 < int(left.sum()) < len(left):
                found[name] = module
    return found


def observe(model: nn.Module, layers: Mapping[str, nn.Module], data: Iterable[Any]) -> dict[str, Moments]:
    """Run the model over the data and return the moments of what these layers are given. O(calls + inputs x C^2)."""
    moments: dict[str, Moments] = {}

    def see(name: str, module: Any) -> Any:
        def hook(_: nn.Module, args: tuple) -> None:
            x = args[0].detach()
            x = x.flatten(0, -2) if isinstance(module, nn.Linear) else _pixels(x, module).flatten(0, -2)
            C = x.shape[1]
            if name not in moments:
                zeros = torch.zeros(C, dtype=torch.float64, device=x.device)
                moments[name] = Moments(0, zeros, torch.zeros(C, C, dtype=torch.float64, device=x.device))
            moments[name].add(x.float())

        return hook

    hooks = [m.register_forward_pre_hook(see(n, m)) for n, m in layers.items()]
    try:
        with evaluating(model), torch.no_grad():
            for batch in data:
                call(model, on_device(model, batch))
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def _pixels(x: Tensor, conv: Any) -> Tensor:
    """Images as rows of channels: the pixels that a convolution of one pixel and a stride reads, else all."""
    images = x if x.dim() == len(conv.kernel_size) + 2 else x[None]
    if set(conv.kernel_size) == {1}:
        images = images[(..., *(slice(None, None, s) for s in conv.stride))]
    return images.movedim(1, -1)


def compensation(moments: Moments, left: Tensor, intercept: bool) -> tuple[Tensor, Tensor]:
    """Return B [C, S] and the intercept [C] (zeros without), fp64: h ~ B h_S + intercept. O(C S^2).

    >>> seen = Moments(0, torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64))
    >>> seen.add(torch.tensor([[1.0, 2.0], [3.0, 6.0], [2.0, 4.0]]))  # the second is twice the first
    >>> B, _ = compensation(seen, torch.tensor([True, False]), intercept=False)
    >>> [round(float(b), 2) for b in B.flatten()]
    [1.0, 2.0]
    """
    n = max(moments.count, 1)
    mean = moments.first / n if intercept else torch.zeros_like(moments.first)
    cov = moments.second / n - mean[:, None] * mean
    inner = cov[left][:, left]
    ridge = RIDGE * inner.diagonal().mean().clamp(min=1e-12)
    B = torch.linalg.solve(inner + ridge * torch.eye(len(inner), dtype=cov.dtype, device=cov.device), cov[left]).T
    own = torch.eye(len(left), dtype=cov.dtype, device=cov.device)[:, left]
    B[left] = own[left]  # what is still there is itself
    return B, mean - B @ mean[left]


def make_up(
    layers: Mapping[str, nn.Module],
    graph: Graph,
    masks: Mapping[Axis, Tensor],
    dense: Mapping[str, Tensor],
    moments: Mapping[str, Moments],
    how: Iterable[str],
) -> list[str]:
    """Give cut layers weights that make up for lost inputs; `dense`: weights before the cut. Return their names."""
    done = []
    for name, module in layers.items():
        if name not in moments:
            continue
        layer: Any = module
        rows, left = (kept(e, masks.get) for e in graph.dims[name][:2])
        B, shift = compensation(moments[name], left, "bias" in how and layer.bias is not None)
        W = dense[name][rows].double()
        lost = torch.einsum("oc...,cs->os...", W, B)
        with torch.no_grad():
            if "ridge" in how:
                layer.weight.copy_(lost)
            if "bias" in how and layer.bias is not None:
                more = shift if "ridge" in how else _mean_of_lost(moments[name], left)
                layer.bias.add_(torch.einsum("oc...,c->o", W, more).to(layer.bias.dtype))
        done.append(name)
    return done


def _mean_of_lost(moments: Moments, left: Tensor) -> Tensor:
    mean = moments.first / max(moments.count, 1)
    return torch.where(left, torch.zeros_like(mean), mean)


def renew_batch_norms(model: nn.Module, data: Iterable[Any]) -> int:
    """Take the running statistics of every BatchNorm anew, as the mean over the data; return how many there are."""
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    if not norms:
        return 0
    with evaluating(model), torch.no_grad(), _averaging(norms):
        for batch in data:
            call(model, on_device(model, batch))
    return len(norms)


@contextmanager
def _averaging(norms: list[Any]) -> Any:
    """Have BatchNorms average over all batches that they see."""
    before = [(m, m.momentum) for m in norms]
    try:
        for m in norms:
            m.reset_running_stats()
            m.momentum, m.training = None, True
        yield
    finally:
        for m, momentum in before:
            m.momentum = momentum
