"""Correct the statistics of BatchNorms after a cut, so that their outputs are distributed as in the dense model.

m, d  mean and standard deviation of a channel's inputs over the data, in the dense model
n, c  the same in the cut model
r, s  running mean and standard deviation of the dense model
r' = n - (m - r) c / d,  s' = s c / d:  then outputs of the norm have the dense model's mean and standard deviation

Averages over the data alone, as torch makes them, are of the data: a few samples would replace what was collected in
training. Here only the change counts. Without a cut the statistics stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError, first_line
from rarefy.dependency.graph import Graph
from rarefy.dependency.symbolic_dims import Axis, kept_mask
from rarefy.model.forward import call, evaluating, on_device, temporary_hooks

CONSTANT = 1e-6  # times the running standard deviation: a channel that varies less has no scale to compare


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the inputs of a norm, [C] each, in fp64."""

    count: int
    first: Tensor  # sum
    square: Tensor  # sum of squares

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Return the sums of inputs [N, C, ...]."""
        count = x.numel() // max(x.shape[1], 1)
        variance, mean = torch.var_mean(x.float(), [d for d in range(x.dim()) if d != 1], correction=0)
        return cls(count, mean.double() * count, (variance.double() + mean.double().square()) * count)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.first + other.first, self.square + other.square)

    @property
    def mean(self) -> Tensor:
        """Return the mean of each channel."""
        return self.first / self.count

    @property
    def deviation(self) -> Tensor:
        """Return the standard deviation of each channel."""
        return (self.square / self.count - self.mean.square()).clamp(min=0).sqrt()


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """Return the BatchNorms that keep running statistics, by name."""
    batch_norm = nn.modules.batchnorm._BatchNorm
    return {n: m for n, m in model.named_modules() if isinstance(m, batch_norm) and m.running_mean is not None}


def copy_before_cut(model: nn.Module) -> nn.Module | None:
    """Return a copy of a model that is going to be cut; None for one without BatchNorms.

    Raises ModelError for a model that cannot be copied.
    """
    if not batch_norms(model):
        return None
    computed = {  # such as the weight of torch's older weight_norm
        id(t): t.detach().clone() for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor)
    }
    try:
        return copy.deepcopy(model, computed)
    except Exception as error:  # raised by whatever the model holds
        raise ModelError(
            f"{type(model).__name__} cannot be copied, which repair='batchnorm' needs: give "
            f"repair=['ridge', 'bias'] ({first_line(error)})"
        ) from error


def match_batch_norms_(
    model: nn.Module, dense: nn.Module, graph: Graph, masks: Mapping[Axis, Tensor], data: Iterable[Any]
) -> list[str]:
    """Set the running statistics of a cut model's BatchNorms, in place, and return the names of these norms.

    Both models run on each batch. Within a batch each norm is corrected at once, so that the layers behind it get
    inputs as they will be. The caller restores the statistics if needed.

    Args:
        model: the cut model.
        dense: the model before the cut.
        graph: what belongs together in the dense model.
        masks: the units that stayed.
        data: batches, read once.

    Raises:
        DataError: for data without a batch.
        ModelError: for statistics that are not finite.
    """
    norms, references = batch_norms(model), batch_norms(dense)
    stayed = {n: kept_mask(graph.dims[f"{n}.running_mean"][0], masks.get) for n in norms}
    totals: dict[str, tuple[Moments, Moments]] = {}
    expected: dict[str, list[Moments]] = {}  # in this batch, call by call

    def observe(name: str) -> Any:
        def hook(norm: Any, args: tuple) -> None:
            expected.setdefault(name, []).append(Moments.of(args[0]))

        return hook

    def correct(name: str) -> Any:
        def hook(norm: Any, args: tuple) -> None:
            if expected.get(name):
                before, after = expected[name].pop(0), Moments.of(args[0])
                seen = totals.get(name)
                totals[name] = (before, after) if seen is None else (seen[0] + before, seen[1] + after)
                _set(norm, references[name], stayed[name], before, after)

        return hook

    batches = 0
    with evaluating(model), evaluating(dense), torch.no_grad():
        for batch in data:
            batch = on_device(model, batch)
            expected.clear()
            with temporary_hooks([references[n].register_forward_pre_hook(observe(n)) for n in norms]):
                call(dense, batch)
            with temporary_hooks([norm.register_forward_pre_hook(correct(n)) for n, norm in norms.items()]):
                call(model, batch)
            batches += 1
        for name, pair in totals.items():
            _set(norms[name], references[name], stayed[name], *pair)
    if not batches:
        raise DataError("the data gave no batch: BatchNorm statistics need at least one")
    name = next((n for n, m in norms.items() if not all(torch.isfinite(b).all() for b in m.buffers())), None)
    if name is not None:
        raise ModelError(f"{name}: running statistics are not finite on this data: NaN or inf in inputs or weights")
    return list(norms)


def _set(norm: Any, reference: Any, mask: Tensor, dense: Moments, cut: Moments) -> None:
    """Set the statistics of a norm of the cut model."""
    mask = mask.to(reference.running_mean.device)
    mean, deviation = dense.mean[mask], dense.deviation[mask]
    running_mean = reference.running_mean[mask].double()
    running_deviation = (reference.running_var[mask].double() + norm.eps).sqrt()
    smallest = CONSTANT * running_deviation
    compared = (deviation > smallest) & (cut.deviation > smallest)
    ratio = torch.where(compared, cut.deviation / deviation, 1.0)
    norm.running_mean.copy_(cut.mean - (mean - running_mean) * ratio)
    norm.running_var.copy_(((running_deviation * ratio).square() - norm.eps).clamp(min=0.0))
