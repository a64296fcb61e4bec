"""How far the inputs of layers reach, and how they are rounded to 8 bits: in each call, or by a calibration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError
from rarefy.common.progress import track
from rarefy.model.activation_quant import Inputs, takes_inputs
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import Layer
from rarefy.runtime.accelerate import WEIGHT_READERS

OBSERVERS = ("minmax", "percentile", "mse")
KINDS = ("int8", "int8-static")  # dynamic: a scale for each row, found in each call; static: one, found beforehand
SAMPLES = 1 << 16  # values of a batch that are kept
TAIL = 1e-4  # share of the values that a percentile leaves out at each end
SHRINKS = 30


def input_grids(
    model: nn.Module,
    layers: Sequence[Layer],
    kind: str,
    observer: str,
    data: Iterable[Any] | None,
    progress: bool = False,
) -> tuple[dict[str, Inputs], list[str]]:
    """Return how the inputs of each layer are to be rounded, by its name, and which layers have none that could be. One
    pass over `data` for static ones; ModelError for inputs that are not finite, DataError for no data."""
    readers = {id(c) for m in model.modules() if isinstance(m, WEIGHT_READERS) for c in m.children()}
    able = [
        l
        for l in layers
        if l.param == "weight" and matmul_modules(l) and not {id(m) for m in matmul_modules(l)} & readers
    ]
    left = [l.full_name for l in layers if l not in able]
    if kind == "int8":
        return {l.full_name: Inputs() for l in able}, left
    assert data is not None
    seen = _watch(model, able, data, progress)
    silent = [n for n, values in seen.items() if not values]
    if silent:
        raise DataError(f"the calibration data is empty, or does not reach {', '.join(silent)}")
    return {name: static_grid(torch.cat(values), observer) for name, values in seen.items()}, left


def matmul_modules(layer: Layer) -> list[nn.Module]:
    """Return the owners of a weight that multiply what they are given by it: an embedding is given numbers of rows."""
    return [m for _, m, _ in layer.owners if takes_inputs(m)]


def static_grid(x: Tensor, observer: str) -> Inputs:
    """Return the grid of 8 bits for values like x; zero is one of its points.

    >>> static(torch.tensor([0.0, 2.55]), "minmax")
    Inputs(bits=8, scale=0.00999..., zero=0)
    """
    low, high = float(x.min().clamp(max=0)), float(x.max().clamp(min=0))
    if observer == "percentile":
        ends = torch.quantile(x.double(), torch.tensor([TAIL, 1 - TAIL], dtype=torch.float64))
        low, high = min(0.0, float(ends[0])), max(0.0, float(ends[1]))
    if observer != "mse":
        return _between(low, high)
    tries = [_between(low * s, high * s) for s in (1 - 0.9 * i / SHRINKS for i in range(SHRINKS))]
    return min(tries, key=lambda g: float((g(x) - x).square().sum()))


def _between(low: float, high: float) -> Inputs:
    scale = (high - low) / 255
    scale = scale if scale > 1e-30 else 1.0
    return Inputs(8, scale, min(255, max(0, round(-low / scale))))


def _watch(model: nn.Module, layers: Sequence[Layer], data: Iterable[Any], progress: bool) -> dict[str, list[Tensor]]:
    """Some of the values that each layer is given, its least and largest among them."""
    rng = torch.Generator().manual_seed(0)
    seen: dict[str, list[Tensor]] = {l.full_name: [] for l in layers}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach().float().flatten()
            if not bool(torch.isfinite(x).all()):
                raise ModelError(f"{name} is given NaN or inf in the calibration data: its inputs have no range")
            if x.numel():
                some = x[torch.randint(len(x), (min(len(x), SAMPLES),), generator=rng).to(x.device)]
                seen[name].append(torch.cat([some, x.min()[None], x.max()[None]]).cpu())

        return hook

    with evaluating(model), torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            for module in matmul_modules(layer):
                hook = module.register_forward_pre_hook(watch(layer.full_name), with_kwargs=True)
                stack.callback(hook.remove)
        for batch in track(data, "ranges of inputs", progress):
            call(model, on_device(model, batch))
    return seen
