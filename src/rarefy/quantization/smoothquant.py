"""SmoothQuant (Xiao 2023): move the scale of large input channels from activations into weights.

Input channel j is divided by s_j in the layer that produces it, and the consuming weights are multiplied by s_j. The
function of the model stays; its activations are easier to quantize.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)   (eq. 4)

The producer of inputs is found by running the model: a norm or Linear layer whose output (or its ReLU) is the very
tensor that layers consume. A second run verifies that nothing else reads it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.gram import padding_mask, token_rows
from rarefy.common.errors import DataError, ModelError
from rarefy.common.progress import track
from rarefy.model.activation_quant import get_activation_quant
from rarefy.model.batches import tensors_in
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import Layer
from rarefy.model.mha import without_mha_fastpath
from rarefy.model.quant_grid import attached_grid, recorded_grids

FLOOR = 0.1  # of the median of the channels' maxima
NEAR = 1e-3  # allowed relative change of outputs in fp32; a scale that is read elsewhere changes them far more


@dataclass
class SmoothGroup:
    """A module that produces a tensor, and the layers that consume it."""

    producer: nn.Module
    name: str
    layers: list[Layer] = field(default_factory=list)


def smooth_(
    model: nn.Module, layers: Sequence[Layer], data: Iterable[Any], alpha: float, progress: bool = False
) -> tuple[dict[str, str], Callable[[], None]]:
    """Move scales from the inputs of Linear layers into their producers, in place.

    Returns {layer: producer} of the smoothed layers, and a function that undoes it. Masked weights keep their zeros.
    Two calls of the model and one pass over `data`; a call for each producer where one of them has other consumers.
    """
    data = data if isinstance(data, list | tuple) else list(data)
    if not data:
        raise DataError("the calibration data is empty: smoothing needs at least one batch")
    supported = [l for l in layers if isinstance(l.module, nn.Linear) and len(l.owners) == 1 and not l.tied_to]
    supported = [l for l in supported if attached_grid(l.module, l.param) is None and not recorded_grids(l.module)]
    groups = _groups(model, supported, data[0])
    maxima = _channel_maxima(model, supported, data, progress)
    before = _outputs(model, data[0])
    fp32 = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    near = NEAR if fp32 else 30 * NEAR

    def scale_and_verify(selected: Sequence[SmoothGroup]) -> list[tuple[nn.Parameter, Tensor]] | None:
        """Scale groups; return the old parameters, or None where outputs change, with everything restored."""
        old: list[tuple[nn.Parameter, Tensor]] = []
        for group in selected:
            inputs = torch.stack([maxima[l.full_name] for l in group.layers]).amax(0)
            weights = torch.stack([l.weight.detach().float().abs().amax(0) for l in group.layers]).amax(0)
            scale = smoothing_scale(inputs, weights, alpha)
            old += [(p, p.detach().clone()) for p in _parameters(group)]
            _scale(group, scale)
        try:
            if _close(_outputs(model, data[0]), before, near):
                return old
        except BaseException:  # also Ctrl-C
            _restore(old)
            raise
        _restore(old)
        return None

    saved = scale_and_verify(groups)
    done = groups
    if saved is None:  # something else reads one of the tensors: try each group alone
        saved, done = [], []
        try:
            for group in groups:
                old = scale_and_verify([group])
                if old is not None:
                    saved += old
                    done.append(group)
        except BaseException:
            _restore(saved)
            raise
    return {l.full_name: g.name for g in done for l in g.layers}, partial(_restore, saved)


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Return the factor of each channel: max|X|^alpha / max|W|^(1 - alpha) (Xiao 2023, eq. 4), [channels].

    Maxima that are far below the median are raised to a part of it: a channel that was silent on the calibration data
    may not be on other data.
    """
    inputs, weights = (m.clamp(min=max(FLOOR * float(m.median()), 1e-5)) for m in (inputs, weights))
    return inputs**alpha / weights ** (1 - alpha)


@torch.no_grad()
def _restore(old: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Restore the values of parameters."""
    for p, value in reversed(old):
        p.copy_(value)


def _groups(model: nn.Module, layers: Sequence[Layer], batch: Any) -> list[SmoothGroup]:
    """Return the producers of layer inputs with the layers they feed, in the order of execution."""
    sources: dict[int, tuple[Any, nn.Module]] = {}  # id of a tensor: weak reference to it, and its producer
    groups: dict[int, SmoothGroup] = {}
    names = {m: n for n, m in model.named_modules()}
    by_module = {id(l.module): l for l in layers}

    def record_output(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            source = sources.get(id(args[0])) if isinstance(module, nn.ReLU) and args else None
            producer = source[1] if source is not None and source[0]() is args[0] else module
            sources[id(output)] = weakref.ref(output), producer

    def record_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        source = sources.get(id(x))
        if source is not None and source[0]() is x and _can_absorb(source[1], by_module[id(module)].original.shape[1]):
            group = groups.setdefault(id(source[1]), SmoothGroup(source[1], names[source[1]]))
            if by_module[id(module)] not in group.layers:
                group.layers.append(by_module[id(module)])

    with evaluating(model), without_mha_fastpath(), torch.no_grad(), ExitStack() as stack:
        for module in model.modules():
            if not list(module.children()) or isinstance(module, nn.ReLU):
                stack.callback(module.register_forward_hook(record_output).remove)
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(record_input, with_kwargs=True).remove)
        call(model, on_device(model, batch))
    return list(groups.values())


def _can_absorb(producer: nn.Module, width: int) -> bool:
    """Return whether dividing a module's parameters divides its outputs: norms with a weight, Linear layers."""
    weight = producer._parameters.get("weight")
    if weight is None or recorded_grids(producer) or get_activation_quant(producer) is not None:
        return False  # parametrized, or quantized
    norm = "Norm" in type(producer).__name__ and tuple(weight.shape) == (width,)
    return norm or (type(producer) is nn.Linear and weight.shape[0] == width)


def _channel_maxima(
    model: nn.Module, layers: Sequence[Layer], data: Iterable[Any], progress: bool
) -> dict[str, Tensor]:
    """Return max|X_j| of the inputs of each layer over the data, [channels]."""
    maxima: dict[str, Tensor] = {}
    mask: Tensor | None = None

    def recorder(layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            inputs = args[0] if args else next(iter(kwargs.values()))
            rows = token_rows(inputs.detach().float(), mask)
            if not len(rows):
                return
            x = rows.abs().amax(0)
            if not bool(torch.isfinite(x).all()):
                raise ModelError(f"{layer.full_name} gets NaN or inf on the calibration data")
            previous = maxima.get(layer.full_name)
            maxima[layer.full_name] = x if previous is None else torch.maximum(previous, x)

        return hook

    with evaluating(model), without_mha_fastpath(), torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(recorder(layer), with_kwargs=True).remove)
        for batch in track(data, "channels of inputs", progress):
            batch = on_device(model, batch)
            mask = padding_mask(batch)
            call(model, batch)
    return maxima


def _parameters(group: SmoothGroup) -> list[nn.Parameter]:
    """Return the parameters that smoothing changes."""
    producer = [p for n in ("weight", "bias") if (p := group.producer._parameters.get(n)) is not None]
    return [*producer, *(l.original for l in group.layers)]


@torch.no_grad()
def _scale(group: SmoothGroup, scale: Tensor) -> None:
    """Divide the producer's outputs by `scale` [channels] and multiply the consuming weights."""
    for name in ("weight", "bias"):
        p = group.producer._parameters.get(name)
        if p is not None:
            p.div_((scale if p.dim() == 1 else scale[:, None]).to(p))
    for layer in group.layers:
        layer.original.mul_(scale.to(layer.original))


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """Return the floating-point outputs of a call, in fp32."""
    with evaluating(model), without_mha_fastpath(), torch.no_grad():
        return [t.detach().float() for t in tensors_in(call(model, on_device(model, batch))) if t.is_floating_point()]


def _close(result: Sequence[Tensor], expected: Sequence[Tensor], near: float) -> bool:
    """Return whether outputs agree within a relative norm."""
    return len(result) == len(expected) and all(
        float((a - b).norm()) <= near * float(b.norm().clamp(min=1e-12)) for a, b in zip(result, expected)
    )
