"""Correct the statistics of BatchNorms after a cut, so that their outputs are distributed as in the dense model.

m, d  mean and standard deviation of a channel's inputs over the data, in the dense model
n, c  the same in the cut model
r, s  running mean and standard deviation of the dense model
q = sqrt((c^2 + k s^2) / (d^2 + k s^2)),  s' = s q,  r' = n - (m - r) q

With k = 0, outputs of the norm would have exactly the dense model's mean and standard deviation. A small k bounds q for
channels that hardly vary on this data. Averages over the data alone, as torch makes them, would replace the statistics
of training by those of a few samples. Without a cut the statistics stay as they are.
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

PRIOR = 1e-2  # k


@dataclass(frozen=True, eq=False)
class ChannelMoments:
    """Number, mean and variance of the inputs of a norm, by channel [C] in fp64."""

    count: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, x: Tensor) -> ChannelMoments:
        """Return the moments of inputs [N, C, ...]."""
        variance, mean = torch.var_mean(x.float(), [d for d in range(x.dim()) if d != 1], correction=0)
        return cls(x.numel() // x.shape[1], mean.double(), variance.double())

    def __add__(self, other: ChannelMoments) -> ChannelMoments:
        count = self.count + other.count
        a, b = self.count / count, other.count / count
        between = a * b * (other.mean - self.mean).square()
        return ChannelMoments(count, a * self.mean + b * other.mean, a * self.variance + b * other.variance + between)


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

    Both models run on each batch. Norms are corrected while the cut model runs, by all batches so far, so that later
    layers get inputs as they will be. The caller restores the statistics if needed.

    Args:
        model: the cut model.
        dense: a copy from before the cut.
        graph: what belongs together in the dense model.
        masks: the units that stayed.
        data: batches, read once.

    Raises:
        DataError: for data without a batch.
        ModelError: for statistics that are not finite.
    """
    norms, references = batch_norms(model), batch_norms(dense)
    stayed = _stayed(norms, graph, masks)
    totals: dict[str, tuple[ChannelMoments, ChannelMoments]] = {}
    expected: dict[str, list[ChannelMoments]] = {}  # of the dense model in this batch, call by call

    def observe(name: str) -> Any:
        def hook(norm: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            x = (args or tuple(kwargs.values()))[0].detach()
            if x.numel():
                expected.setdefault(name, []).append(ChannelMoments.of(x))

        return hook

    def correct(name: str) -> Any:
        def hook(norm: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            x = (args or tuple(kwargs.values()))[0].detach()
            if not x.numel() or not expected.get(name):
                return
            before, after = expected[name].pop(0), ChannelMoments.of(x)
            seen = totals.get(name)
            totals[name] = (before, after) if seen is None else (seen[0] + before, seen[1] + after)
            _set(norm, references[name], stayed[name], *totals[name])

        return hook

    batches = 0
    with evaluating(model), evaluating(dense), torch.no_grad():
        for batch in data:
            batch = on_device(model, batch)
            expected.clear()
            for run, hooked, hook in ((dense, references, observe), (model, norms, correct)):
                with temporary_hooks([hooked[n].register_forward_pre_hook(hook(n), with_kwargs=True) for n in stayed]):
                    call(run, batch)
            batches += 1
    if not batches:
        raise DataError("the data gave no batch: BatchNorm statistics need at least one")
    name = next((n for n in totals if not all(torch.isfinite(b).all() for b in norms[n].buffers())), None)
    if name is not None:
        raise ModelError(f"{name}: running statistics are not finite on this data: NaN or inf in inputs or weights")
    return list(totals)


def _stayed(norms: Mapping[str, Any], graph: Graph, masks: Mapping[Axis, Tensor]) -> dict[str, Tensor]:
    """Return which channels of each norm stayed, bool [C]; a norm that the graph does not know is left out."""
    known = {id(m): n for n, owners in graph.owners.items() for m, attribute in owners if attribute == "running_mean"}
    return {
        name: kept_mask(graph.dims[known[id(norm)]][0], masks.get) for name, norm in norms.items() if id(norm) in known
    }


def _set(norm: Any, reference: Any, stayed: Tensor, dense: ChannelMoments, cut: ChannelMoments) -> None:
    """Set the statistics of a norm of the cut model."""
    stayed = stayed.to(reference.running_mean.device)
    mean, variance = dense.mean[stayed], dense.variance[stayed]
    running_mean, running_variance = reference.running_mean[stayed].double(), reference.running_var[stayed].double()
    running_variance = running_variance + norm.eps
    ratio = ((cut.variance + PRIOR * running_variance) / (variance + PRIOR * running_variance)).sqrt()
    new_variance = (running_variance * ratio.square()).clamp(min=norm.eps)
    norm.running_mean.copy_(cut.mean - (mean - running_mean) * (new_variance / running_variance).sqrt())
    norm.running_var.copy_(new_variance - norm.eps)
