"""Activation observers: the 8-bit grids of layer inputs, dynamic (in each call) or static (by calibration)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.gram import padding_mask, token_rows
from rarefy.calibration.static_grids import Sample, static_grid
from rarefy.common.errors import DataError, ModelError
from rarefy.common.progress import track
from rarefy.model.activation_quant import ActivationQuant, has_quantizable_input
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import Layer
from rarefy.model.mha import without_mha_fastpath
from rarefy.runtime.accelerate import WEIGHT_READERS

KINDS = ("int8", "int8-static")  # dynamic: a scale for each row and call; static: one scale from calibration


def input_grids(
    model: nn.Module,
    layers: Sequence[Layer],
    kind: str,
    observer: str,
    data: Iterable[Any] | None,
    progress: bool = False,
) -> tuple[dict[str, ActivationQuant], list[str]]:
    """Return {layer: grid of its inputs}, and the names of layers whose inputs cannot be quantized.

    Static grids take one pass over `data`. Raises ModelError for inputs that are not finite, DataError for empty data.
    """
    readers = {id(c) for m in model.modules() if isinstance(m, WEIGHT_READERS) for c in m.children()}
    supported = []
    for layer in layers:
        modules = matmul_modules(layer)
        if layer.param == "weight" and modules and not {id(m) for m in modules} & readers:
            supported.append(layer)
    skipped = [l.full_name for l in layers if l not in supported]
    if kind == "int8":
        return {l.full_name: ActivationQuant() for l in supported}, skipped
    assert data is not None
    samples = _sample_inputs(model, supported, data, progress)
    missed = [n for n, sample in samples.items() if not sample.parts]
    if missed:
        raise DataError(f"the calibration data is empty, or does not reach {', '.join(missed)}")
    return {name: static_grid(sample.values(), observer) for name, sample in samples.items()}, skipped


def matmul_modules(layer: Layer) -> list[nn.Module]:
    """Return the owners of a weight that multiply their inputs by it (an embedding looks up rows)."""
    return [m for _, m, _ in layer.owners if has_quantizable_input(m)]


def _sample_inputs(model: nn.Module, layers: Sequence[Layer], data: Iterable[Any], progress: bool) -> dict[str, Sample]:
    """Return sampled input values of each layer."""
    rng = torch.Generator().manual_seed(0)
    samples = {l.full_name: Sample() for l in layers}
    mask: Tensor | None = None

    def recorder(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach().float()
            x = (token_rows(x, mask) if x.dim() else x).flatten()
            if not bool(torch.isfinite(x).all()):
                raise ModelError(f"{name} gets NaN or inf on the calibration data: its inputs have no finite range")
            if x.numel():
                samples[name].add(x, rng)

        return hook

    with evaluating(model), without_mha_fastpath(), torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            for module in matmul_modules(layer):
                hook = module.register_forward_pre_hook(recorder(layer.full_name), with_kwargs=True)
                stack.callback(hook.remove)
        for batch in track(data, "ranges of inputs", progress):
            batch = on_device(model, batch)
            mask = padding_mask(batch)
            call(model, batch)
    return samples
