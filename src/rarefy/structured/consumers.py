"""Consumers of a group's units: the layers that read them, and statistics of their inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.gram import padding_mask
from rarefy.common.errors import DataError, ModelError
from rarefy.dependency.graph import Graph, Group
from rarefy.dependency.symbolic_dims import Algebra, Axis, Expr, Prod, leaves
from rarefy.model.forward import call, evaluating, on_device, temporary_hooks
from rarefy.model.layout import layout

CONSUMER_TYPES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer whose weight reads units: Linear, convolution, Hugging Face's Conv1D.

    name    of its weight
    axis    dimension of the weight that holds the inputs
    inputs  channels (features) of its input, as axes
    plain   every output reads every input: no groups
    """

    name: str
    module: Any
    axis: int
    inputs: Expr
    plain: bool

    def matrix(self) -> Tensor:
        """Return the weight as fp32 [inputs, the rest]; with groups, each input has the weights of its group."""
        W = self.module.weight.detach().float()
        groups = getattr(self.module, "groups", 1)
        if groups > 1:
            W = W.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
            return W.flatten(1)
        return W.transpose(0, self.axis).flatten(1)

    def rows(self, x: Tensor) -> Tensor:
        """Return the inputs as rows of features, [n, C].

        Of an image these are the pixels that a 1 x 1 convolution with its stride reads, otherwise all pixels.
        """
        if not isinstance(self.module, nn.modules.conv._ConvNd):
            return x.reshape(-1, x.shape[-1])
        images = x if x.dim() == len(self.module.kernel_size) + 2 else x[None]
        if set(self.module.kernel_size) == {1}:
            images = images[(..., *(slice(None, None, s) for s in self.module.stride))]
        return images.movedim(1, -1).flatten(0, -2)


def all_consumers(graph: Graph) -> list[Consumer]:
    """Return every layer of a graph that reads units and whose weight is not shared."""
    consumers = []
    for name, owners in graph.owners.items():
        module: Any = owners[0][0]
        if len(owners) != 1 or owners[0][1] != "weight":
            continue
        weight_layout = layout(module, "weight")
        if type(module) not in CONSUMER_TYPES and (weight_layout is None or weight_layout.kind != "conv1d-hf"):
            continue
        axis = 1 if type(module) in CONSUMER_TYPES else 0
        dims, groups = graph.dims[name], getattr(module, "groups", 1)
        inputs = dims[axis]
        if groups > 1:
            inputs = Prod((Algebra().factor(dims[0], groups)[0], dims[1]))
        consumers.append(Consumer(name, module, axis, inputs, groups == 1))
    return consumers


def consumers_of(graph: Graph, groups: Iterable[Group]) -> dict[Group, list[Consumer]]:
    """Return the consumers of each group, without layers that also produce its units (depthwise convolutions)."""
    by_axis: dict[Axis, list[Consumer]] = {}
    for c in all_consumers(graph):
        for axis in dict.fromkeys(leaves(c.inputs)):
            by_axis.setdefault(axis, []).append(c)
    producers = {g: {m.name for m in g.members if m.role == "out"} for g in groups}
    return {g: [c for c in by_axis.get(g.axis, ()) if c.name not in producers[g]] for g in producers}


@dataclass(eq=False)
class Moments:
    """Sums over the data of the inputs h of a layer, in fp64.

    count   number of rows
    first   sum of h, [C]
    second  sum of h h', [C, C]; None without a Gram matrix
    sums    without a Gram matrix: sums of |h|, h^2 and h != 0, [C] each
    """

    count: int
    first: Tensor
    second: Tensor | None
    sums: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, C: int, device: Any = "cpu", gram: bool = True) -> Moments:
        """Return empty moments of C features."""

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=torch.float64, device=device)

        return cls(0, zeros(C), zeros(C, C) if gram else None, {k: zeros(C) for k in ("abs", "square", "nonzero")})

    def add(self, x: Tensor) -> None:
        """Add rows [n, C]."""
        self.count += len(x)
        self.first += x.sum(0, dtype=torch.float64)
        if self.second is not None:
            self.second += (x.T @ x).double()
            return
        self.sums["abs"] += x.abs().sum(0, dtype=torch.float64)
        self.sums["square"] += x.square().sum(0, dtype=torch.float64)
        self.sums["nonzero"] += (x != 0).sum(0)

    @property
    def mean_abs(self) -> Tensor:
        """Return the mean of |h|, [C]."""
        return self.sums["abs"] / max(self.count, 1)

    @property
    def nonzero(self) -> Tensor:
        """Return the share of nonzero inputs, [C]."""
        return self.sums["nonzero"] / max(self.count, 1)

    @property
    def variance(self) -> Tensor:
        """Return the variance of h, [C]."""
        n = max(self.count, 1)
        return (self.sums["square"] / n - (self.first / n).square()).clamp(min=0)


def run_batches(model: nn.Module, data: Iterable[Any], padding: list[Tensor | None] | None = None) -> int:
    """Run the model in evaluation mode over the data, for its hooks; return the number of batches.

    During each call `padding[0]` holds the mask of real tokens of the batch's `attention_mask`, or None.
    """
    batches = 0
    with evaluating(model), torch.no_grad():
        for batch in data:
            batches += 1
            batch = on_device(model, batch)
            if padding is not None:
                padding[0] = padding_mask(batch)
            call(model, batch)
    return batches


def collect_moments(
    model: nn.Module, layers: Sequence[Consumer], data: Iterable[Any], *, gram: bool = True
) -> dict[str, Moments]:
    """Run the model over the data and return the moments of the inputs of these layers, by name.

    Padding (`attention_mask`) is left out; a layer that no batch reaches is missing. O(calls + inputs x C^2).
    """
    moments: dict[str, Moments] = {}
    padding: list[Tensor | None] = [None]

    def record(consumer: Consumer) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
            x = (args or tuple(kwargs.values()))[0].detach()
            mask = padding[0]
            x = x[mask] if mask is not None and x.shape[:-1] == mask.shape else consumer.rows(x)
            if consumer.name not in moments:
                moments[consumer.name] = Moments.of(x.shape[-1], x.device, gram)
            moments[consumer.name].add(x.float())

        return hook

    layers = list({consumer.name: consumer for consumer in layers}.values())
    with temporary_hooks(
        [consumer.module.register_forward_pre_hook(record(consumer), with_kwargs=True) for consumer in layers]
    ):
        batches = run_batches(model, data, padding)
    if not batches:
        raise DataError("the data gave no batch: repair and scores need at least one")
    for name, m in moments.items():
        if not torch.isfinite(m.first).all() or (m.second is not None and not torch.isfinite(m.second).all()):
            raise ModelError(f"the inputs of {name} are not finite on this data: NaN or inf in inputs or weights")
    return {name: m for name, m in moments.items() if m.count}
