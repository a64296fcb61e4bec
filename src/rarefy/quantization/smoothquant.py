"""SmoothQuant (Xiao 2023): inputs whose few large channels would spoil a scale are divided, channel by channel, where
they are made, and the weights that read them multiplied. The model stays the same; its inputs are easier to round.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)   (eq. 4)

What makes inputs is found by running the model: a norm or a Linear layer whose output (or the ReLU of it) is the very
tensor that layers are given. Whether nothing else reads it is proved by running the model again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import DataError, ModelError
from rarefy.common.progress import track
from rarefy.model.activation_quant import get_inputs
from rarefy.model.batches import tensors_in
from rarefy.model.forward import call, evaluating, on_device
from rarefy.model.layers import Layer
from rarefy.model.quant_grid import live_grid, notes

NEAR = 1e-3  # of outputs, in fp32; a scale that is read elsewhere changes them by much more


@dataclass
class SmoothGroup:
    """What makes a tensor, and the layers that are given it."""

    maker: nn.Module
    name: str
    layers: list[Layer] = field(default_factory=list)


def smooth_(
    model: nn.Module, layers: Sequence[Layer], data: Iterable[Any], alpha: float, progress: bool = False
) -> tuple[dict[str, str], Callable[[], None]]:
    """Move scales from the inputs of Linear layers into what makes them, in place; return {layer: maker} of those for
    which that was possible, and what undoes it. Weights with masks keep their zeros. Two calls for each maker, and one
    pass over `data`."""
    data = data if isinstance(data, list | tuple) else list(data)
    if not data:
        raise DataError("the calibration data is empty: smoothing needs at least one batch")
    able = [l for l in layers if isinstance(l.module, nn.Linear) and len(l.owners) == 1 and not l.elsewhere]
    able = [l for l in able if live_grid(l.module, l.param) is None and not notes(l.module)]
    fed = _makers(model, able, data[0])
    largest = _largest(model, able, data, progress)
    done: dict[str, str] = {}
    olds: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def undo() -> None:
        for p, value in reversed(olds):
            p.copy_(value)

    before = _outputs(model, data[0])
    wide = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    for one in fed:
        reach = torch.stack([largest[l.full_name] for l in one.layers]).amax(0)
        columns = torch.stack([l.weight.detach().float().abs().amax(0) for l in one.layers]).amax(0)
        scale = (reach.clamp(min=1e-5) ** alpha / columns.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)
        old = [(p, p.detach().clone()) for p in _touched(one)]
        _scale(one, scale)
        if _near(_outputs(model, data[0]), before, NEAR if wide else 30 * NEAR):
            done |= {l.full_name: one.name for l in one.layers}
            olds += old
        else:  # something else reads it too
            with torch.no_grad():
                for p, value in old:
                    p.copy_(value)
    return done, undo


def _makers(model: nn.Module, layers: Sequence[Layer], batch: Any) -> list[SmoothGroup]:
    """What makes the inputs of layers, in the order in which the model runs."""
    made: dict[int, tuple[Any, nn.Module]] = {}  # by id of a tensor: it, weakly, and its maker
    found: dict[int, SmoothGroup] = {}
    names = {m: n for n, m in model.named_modules()}
    by_module = {id(l.module): l for l in layers}

    def out(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            source = made.get(id(args[0])) if isinstance(module, nn.ReLU) and args else None
            maker = source[1] if source is not None and source[0]() is args[0] else module
            made[id(output)] = weakref.ref(output), maker

    def given(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        known = made.get(id(x))
        if known is not None and known[0]() is x and _scales(known[1], by_module[id(module)].original.shape[1]):
            fed = found.setdefault(id(known[1]), SmoothGroup(known[1], names[known[1]]))
            if by_module[id(module)] not in fed.layers:
                fed.layers.append(by_module[id(module)])

    with evaluating(model), torch.no_grad(), ExitStack() as stack:
        for module in model.modules():
            if not list(module.children()) or isinstance(module, nn.ReLU):
                stack.callback(module.register_forward_hook(out).remove)
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(given, with_kwargs=True).remove)
        call(model, on_device(model, batch))
    return list(found.values())


def _scales(maker: nn.Module, width: int) -> bool:
    """Whether dividing a module's own numbers divides its outputs: norms with a scale for each, Linear layers."""
    weight = maker._parameters.get("weight")
    if weight is None or notes(maker) or get_inputs(maker) is not None:  # made from others, or on a grid
        return False
    norm = "Norm" in type(maker).__name__ and tuple(weight.shape) == (width,)
    return norm or (type(maker) is nn.Linear and weight.shape[0] == width)


def _largest(model: nn.Module, layers: Sequence[Layer], data: Iterable[Any], progress: bool) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def see(layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            x = given.detach().float().reshape(-1, given.shape[-1]).abs().amax(0)
            if not bool(torch.isfinite(x).all()):
                raise ModelError(f"{layer.full_name} is given NaN or inf in the calibration data")
            known = found.get(layer.full_name)
            found[layer.full_name] = x if known is None else torch.maximum(known, x)

        return hook

    with evaluating(model), torch.no_grad(), ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(see(layer), with_kwargs=True).remove)
        for batch in track(data, "channels of inputs", progress):
            call(model, on_device(model, batch))
    return found


def _touched(fed: SmoothGroup) -> list[nn.Parameter]:
    own = [p for n in ("weight", "bias") if (p := fed.maker._parameters.get(n)) is not None]
    return [*own, *(l.original for l in fed.layers)]


@torch.no_grad()
def _scale(fed: SmoothGroup, scale: Tensor) -> None:
    for name in ("weight", "bias"):
        p = fed.maker._parameters.get(name)
        if p is not None:
            p.div_((scale if p.dim() == 1 else scale[:, None]).to(p))
    for layer in fed.layers:
        layer.original.mul_(scale.to(layer.original))


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with evaluating(model), torch.no_grad():
        return [t.detach().float() for t in tensors_in(call(model, on_device(model, batch))) if t.is_floating_point()]


def _near(got: Sequence[Tensor], want: Sequence[Tensor], near: float) -> bool:
    return len(got) == len(want) and all(
        float((a - b).norm()) <= near * float(b.norm().clamp(min=1e-12)) for a, b in zip(got, want)
    )
