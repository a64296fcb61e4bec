"""A short search on the true loss, around the allocation that dynamic programming finds from measured errors.

Measured errors compare layers of one kind well, layers of different kinds less well, and they ignore how errors
accumulate. So each kind of layer has a factor on its errors, depth has another, and the result is pulled towards
uniform by a common amount: a handful of numbers, optimized with a fixed number of evaluations of the model's own loss.
(SPDY, Frantar 2022, searches a factor for each layer; EvoPress, Sieberling 2024, the sparsities.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError
from rarefy.common.progress import track
from rarefy.model.batches import count_tokens, first_samples, take_tokens, tensors_in
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.hf import is_causal_lm
from rarefy.model.layers import Layer
from rarefy.model.losses import Loss, default_loss, has_loss, resolve_loss
from rarefy.prune.allocation import LEVELS, cheapest_allocation, line, shift_to_mean

TRIALS = 16
TOKENS = 2048  # (or samples) of the calibration data, from its end: gradients come from its beginning


def search_allocation(
    model: nn.Module,
    layers: Sequence[Layer],
    costs: Mapping[str, Sequence[float]],
    solved: Mapping[str, Sequence[Tensor]],
    sparsity: float,
    data: Sequence[Any],
    loss: Loss | None = None,
    *,
    without_loss: bool = False,
    trials: int = TRIALS,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, float]:
    """Return the allocation with the smallest loss of all that were tried, {layer name: sparsity}.

    Its mean over weights is `sparsity`. Uniform, a line in depth and `cheapest_allocation(costs)` are among those
    tried. The model is left as it was. O(trials) forward passes over the samples, and as many dynamic programs.

    costs         predicted loss of each layer at `LEVELS`
    solved        solved weights of each layer, as stored, at `LEVELS`; between two levels they are interpolated
    data          calibration batches; about `TOKENS` tokens of the last ones are used
    without_loss  the model `lacks_loss`: the distance from its own dense outputs is minimized
    """
    sizes = {l.full_name: l.original.numel() for l in layers}
    kinds = {n: re.sub(r"(?<![^.])\d+(?![^.])", "*", n) for n in sizes}
    columns = {kind: i for i, kind in enumerate(dict.fromkeys(kinds.values()))}
    depth = {n: 2 * i / max(len(sizes) - 1, 1) - 1 for i, n in enumerate(sizes)}
    uniform = dict.fromkeys(sizes, sparsity)
    batches = take_tokens(reversed(data), TOKENS)
    noise = torch.Generator().manual_seed(seed)

    def allocation(point: Tensor) -> dict[str, float]:
        """Return the allocation of a point: log factors of kinds and of depth, and the weight of the uniform one."""
        *by_kind, slope, pull = point.tolist()
        factors = {n: math.exp(by_kind[columns[k]] + slope * depth[n]) for n, k in kinds.items()}
        sparsities = cheapest_allocation({n: [e * factors[n] for e in c] for n, c in costs.items()}, sizes, sparsity)
        share = min(1.0, max(0.0, pull))
        return shift_to_mean({n: s + share * (sparsity - s) for n, s in sparsities.items()}, sizes, sparsity)

    with _mixed_weights(model, layers, solved, batches, loss, without_loss) as loss_at:
        tried = [(loss_at(a), a) for a in (uniform, line(layers, sparsity))]
        starts = torch.zeros(2, len(columns) + 2)
        starts[1, -1] = 0.5
        starting = [(loss_at(a), i, a) for i, a in enumerate(map(allocation, starts))]
        tried += [(value, a) for value, _, a in starting]
        lowest, best, _ = min(starting, key=lambda t: t[0])
        point, step_size = starts[best], 0.5
        for _ in track(range(trials), "searching an allocation by the loss", progress, trials):
            move = torch.randn(len(point), generator=noise)
            move[-1] = move[-1] / 2
            candidate = point + step_size * move
            sparsities = allocation(candidate)
            value = loss_at(sparsities)
            tried.append((value, sparsities))
            better = value < lowest
            point, lowest = (candidate, value) if better else (point, lowest)
            step_size *= 1.3 if better else 0.9
    value, sparsities = min(tried, key=lambda t: t[0])
    if not math.isfinite(value):
        raise ModelError(
            f"the loss of the last calibration batches is {value} for every allocation: "
            "NaN or inf in weights or inputs, or no label but -100"
        )
    return sparsities


@contextmanager
def _mixed_weights(
    model: nn.Module,
    layers: Sequence[Layer],
    solved: Mapping[str, Sequence[Tensor]],
    data: Sequence[Any],
    loss: Loss | None,
    without_loss: bool,
) -> Iterator[Any]:
    """Yield a function from sparsities to the model's mean loss; the weights are restored at the end."""
    dense = {l.full_name: l.original.detach().clone() for l in layers}
    levels = (0.0, *LEVELS, 1.0)

    def loss_at(allocation: Mapping[str, float]) -> float:
        for l in layers:
            name, s = l.full_name, allocation[l.full_name]
            levels_of = [dense[name], *solved[name], torch.zeros_like(dense[name])]
            i = next(i for i in range(len(LEVELS) + 1) if s <= levels[i + 1])
            fraction = (s - levels[i]) / (levels[i + 1] - levels[i])
            l.original.data.copy_(torch.lerp(levels_of[i].to(dense[name]), levels_of[i + 1].to(dense[name]), fraction))
        value = sum(n * distance(call(model, b), b, y) for n, b, y in zip(counts, batches, outputs)) / sum(counts)
        return value if math.isfinite(value) else math.inf

    def distance(output: Any, batch: Any, dense: Tensor | None) -> float:
        if dense is None:
            return float(resolve_loss(loss)(output, batch))
        return float((output_tensor(output).float() - dense).square().sum() / dense.square().sum())

    try:
        with evaluating(model), torch.no_grad():
            batches = [on_device(model, b) for b in data]
            outputs = [output_tensor(call(model, b)).float() if without_loss else None for b in batches]
            counts = [count_tokens(b) for b in batches]
            yield loss_at
    finally:
        for l in layers:
            l.original.data.copy_(dense[l.full_name])


def lacks_loss(model: nn.Module, batch: Any, loss: Loss | None) -> bool:
    """Return whether only the model's own outputs can guide a search: no loss, and no targets that one would need.

    Raises DataError if there are targets, or no outputs either. One forward pass of a sample.
    """
    if loss is not None:
        return False
    sample = on_device(model, first_samples(batch))
    with evaluating(model), torch.no_grad():
        output = call(model, sample)
    if has_loss(output, sample):
        return False
    needs_targets = is_causal_lm(model) or (isinstance(sample, tuple | list) and len(sample) == 2)
    if needs_targets or output_tensor(output) is None:
        default_loss(output, sample)  # raises, and says what is missing
    return True


def output_tensor(output: Any) -> Any:
    """Return the logits of a model's output, or its first floating-point tensor, or None."""
    candidates = [getattr(output, "logits", None), *tensors_in(output)]
    return next((t for t in candidates if isinstance(t, Tensor) and t.is_floating_point()), None)


def output_probe(output: Any, batch: Any) -> Tensor:
    """Return outputs times fixed noise: a loss whose expected squared gradients are the sensitivities of outputs."""
    y = output_tensor(output)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(y.numel()))
    return (y.float() * noise.to(y.device)).mean()
