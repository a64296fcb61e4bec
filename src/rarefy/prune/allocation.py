"""Allocations: how a global sparsity is spread over layers, {layer name: sparsity} with the given weighted mean.

uniform   the same everywhere
erk       density proportional to (outputs + inputs) / (outputs x inputs): small layers stay denser (Evci 2020, RigL)
line      sparsity rises with depth by `slope` from the first layer to the last (Huang 2025, ATP), because early errors
          affect more layers
owl       layers whose Wanda scores have more outliers stay denser (Yin 2024, OWL)
errors    minimizes the sum of predicted losses, which are measured layer errors weighted by the squared gradients of
          the layer's outputs, by dynamic programming over the budget (Frantar 2022, SPDY)
search    `errors`, then a short search on the true loss around it (`rarefy.prune.allocation_search`)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.statistics import LayerStats
from rarefy.common.errors import DataError, PatternError
from rarefy.model.batches import count_tokens
from rarefy.model.forward import call, evaluating, on_device, trainable
from rarefy.model.layers import Layer
from rarefy.model.losses import Loss, check_finite, resolve_loss

ALLOCATIONS = ("uniform", "erk", "line", "owl", "errors", "search")
GRADIENTS = ("errors", "search")  # use gradients of the loss
NEEDS_DATA = ("owl", *GRADIENTS)  # use the calibration data
BUDGET_UNITS = 2000  # parts of the budget in the dynamic program
LEVELS = (0.4, 0.6, 0.8)  # sparsities at which errors are measured
MAX_SPARSITY = 0.97  # so that no layer is empty
TOKENS = {"gradients": 4096, "pass": 1024, "errors": 8192}  # tokens or samples; a backward pass keeps all activations


def shift_to_mean(sparsities: Mapping[str, float], sizes: Mapping[str, int], sparsity: float) -> dict[str, float]:
    """Return sparsities shifted by one common amount so that their mean over weights is `sparsity`. O(layers).

    Each stays within 0..`MAX_SPARSITY`, or the given sparsity if that is higher.

    >>> shift_to_mean({"a": 0.4, "b": 0.6}, {"a": 1, "b": 1}, 0.7)
    {'a': 0.6, 'b': 0.8}
    """
    maximum, total = max(MAX_SPARSITY, sparsity), sum(sizes.values())
    low, high = -2.0, 2.0
    for _ in range(60):
        shift = (low + high) / 2
        mean = sum(min(maximum, max(0.0, s + shift)) * sizes[n] for n, s in sparsities.items()) / total
        low, high = (shift, high) if mean < sparsity else (low, shift)
    return {n: round(min(maximum, max(0.0, s + high)), 9) for n, s in sparsities.items()}


def erk(layers: Sequence[Layer], sparsity: float) -> dict[str, float]:
    """Return Erdos-Renyi-kernel sparsities: density proportional to the sum of a layer's dimensions over their product.

    Layers whose density would exceed 1 stay dense, and the others share the budget.
    """
    size = {l.full_name: l.original.numel() for l in layers}
    raw = {}
    for l in layers:
        _, K, O, I = l.layout.shape
        raw[l.full_name] = (O + I + (K if K > 1 else 0)) / (O * I * K)
    budget, dense = (1 - sparsity) * sum(size.values()), set[str]()
    while True:
        rest = [n for n in raw if n not in dense]
        scale = (budget - sum(size[n] for n in dense)) / max(sum(raw[n] * size[n] for n in rest), 1e-30)
        over = [n for n in rest if raw[n] * scale > 1]
        if not over:
            return {n: 0.0 if n in dense else 1 - raw[n] * scale for n in raw}
        dense.update(over)


def line(layers: Sequence[Layer], sparsity: float, slope: float = 0.15) -> dict[str, float]:
    """Return sparsities that rise by `slope` from the first layer to the last."""
    last = max(len(layers) - 1, 1)
    sparsities = {l.full_name: sparsity + slope * (i / last - 0.5) for i, l in enumerate(layers)}
    return shift_to_mean(sparsities, {l.full_name: l.original.numel() for l in layers}, sparsity)


def owl(
    layers: Sequence[Layer], sparsity: float, stats: Mapping[str, LayerStats], width: float = 0.08, times: float = 5.0
) -> dict[str, float]:
    """Return the sparsities of OWL, within `sparsity` +- `width`.

    A layer with a larger share of Wanda scores above `times` their mean stays denser.
    """
    outliers = {}
    for l in layers:
        score = l.layout.view(l.weight.detach().float()).abs() * stats[l.full_name].in_norm
        outliers[l.full_name] = float((score > times * score.mean()).float().mean())
    low, high = min(outliers.values()), max(outliers.values())
    spread = {n: 2 * width * (o - low) / max(high - low, 1e-12) for n, o in outliers.items()}
    return shift_to_mean(
        {n: sparsity - s for n, s in spread.items()}, {l.full_name: l.original.numel() for l in layers}, sparsity
    )


def sensitivities(
    model: nn.Module, data: Iterable[Any], layers: Sequence[Layer], loss: Loss | None = None
) -> dict[str, Tensor]:
    """Return the mean squared gradient of the loss at each output [O] of each layer that is called as a module.

    That is the cost of a unit of squared error there, to second order with the diagonal of the empirical Fisher matrix.
    One backward pass.
    """
    total: dict[str, Tensor] = {}
    count = 0
    with evaluating(model), ExitStack() as stack, torch.enable_grad():
        current: dict[str, float] = {}

        def observe(name: str, out: Tensor) -> None:
            def add(grad: Tensor) -> None:
                rows = grad.float().flatten(0, -2) if name in plain else grad.float().transpose(0, 1).flatten(1).T
                squared = rows.square().sum(0) * current["tokens"] ** 2
                total[name] = squared if name not in total else total[name] + squared

            if out.requires_grad:
                out.register_hook(add)

        plain = {l.full_name for l in layers if l.layout.kind in ("linear", "conv1d-hf")}
        for layer in layers:
            if layer.layout.kind in ("linear", "conv1d-hf", "conv", "conv-transposed"):
                for _, module, _ in layer.owners:
                    hook = lambda m, a, out, name=layer.full_name: observe(name, out)  # noqa: E731
                    stack.callback(module.register_forward_hook(hook).remove)
        weights = [l.original for l in layers]
        stack.enter_context(trainable(weights))
        for index, batch in enumerate(data):
            batch = on_device(model, batch)
            current["tokens"] = count_tokens(batch)
            value = check_finite(resolve_loss(loss)(call(model, batch), batch), index)
            if not value.requires_grad:
                raise DataError("the loss does not depend on any selected layer: give another loss")
            torch.autograd.grad(value, weights, allow_unused=True)
            count += count_tokens(batch)
    return {n: t / max(count, 1) for n, t in total.items()}


def fill_missing(known: dict[str, Tensor], layers: Sequence[Layer]) -> dict[str, Tensor]:
    """Return sensitivities [outputs] for all layers; layers without a measurement get the mean of the others."""
    mean = torch.stack([t.mean() for t in known.values()]).mean() if known else torch.tensor(1.0)
    filled = {}
    for layer in layers:
        G, _, O, _ = layer.layout.shape
        filled[layer.full_name] = known[layer.full_name] if layer.full_name in known else mean.expand(G * O)
    return filled


def interpolate_errors(errors: Sequence[float], sparsity: Tensor) -> Tensor:
    """Return the error at each sparsity: log-quadratic through the errors at `LEVELS`, and 0 at 0."""
    a, b, c = LEVELS
    logs = [math.log(max(e, 1e-30)) for e in errors]
    x = sparsity.double()
    value = (
        logs[0] * (x - b) * (x - c) / ((a - b) * (a - c))
        + logs[1] * (x - a) * (x - c) / ((b - a) * (b - c))
        + logs[2] * (x - a) * (x - b) / ((c - a) * (c - b))
    ).exp()
    small = x < a
    value[small] = math.exp(logs[0]) * (x[small] / a) ** 3  # below the lowest measured level: cubic towards 0
    return value.cummax(0).values


def cheapest_allocation(
    costs: Mapping[str, Sequence[float]], sizes: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """Return the sparsities with the smallest total cost; `costs` gives the predicted loss of each layer at `LEVELS`.

    Exact over 49 sparsities per layer and a budget of `BUDGET_UNITS` parts. O(layers x 49 x BUDGET_UNITS).
    """
    total = sum(sizes.values())
    grid = torch.arange(49, dtype=torch.float64) / 50  # 0 .. 0.96
    names = list(costs)
    best = torch.full((BUDGET_UNITS + 1,), float("inf"), dtype=torch.float64)
    best[0] = 0.0
    choices = []
    for name in names:
        cost = interpolate_errors(costs[name], grid)
        parts = (grid * sizes[name] / total * BUDGET_UNITS).round().long()
        options = torch.full((len(grid), BUDGET_UNITS + 1), float("inf"), dtype=torch.float64)
        for level, part in enumerate(parts.tolist()):
            options[level, part:] = best[: BUDGET_UNITS + 1 - part] + cost[level]
        best, choice = options.min(0)
        choices.append((choice, parts))
    position = round(sparsity * BUDGET_UNITS)
    reachable = torch.isfinite(best).nonzero()[:, 0]
    if not len(reachable):
        raise PatternError("no allocation reaches the budget")
    position = int(reachable[(reachable - position).abs().argmin()])
    allocation = {}
    for name, (choice, parts) in zip(reversed(names), reversed(choices)):
        level = int(choice[position])
        allocation[name], position = float(grid[level]), position - int(parts[level])
    return shift_to_mean({n: allocation[n] for n in names}, sizes, sparsity)
