"""Inputs of layers in few bits: rounded before the layer sees them, by a scale that is known (static) or found in each
call (dynamic), and gradients go straight through.

What a layer's inputs lie on is plain data beside the module, `rarefy_input`, with a hook that rounds them; it is copied
and pickled with the module, and `save` writes it down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ContainerError
from rarefy.model.layout import is_hf_conv1d
from rarefy.model.quant_grid import StraightThrough

NOTE = "rarefy_input"
MIN_SCALE = 1e-36  # a step below this is none: one over it would be infinite


@dataclass(frozen=True)
class ActivationQuant:
    """How inputs are rounded.

    scale   of static ones, with `zero` the code of zero in 0..2^bits - 1; None: dynamic, symmetric, a scale for each
            row of a Linear's inputs, for each image of a convolution's

    >>> ActivationQuant(8, 0.5, 0)(torch.tensor([0.2, 1.4, -3.0])).tolist()
    [0.0, 1.5, 0.0]
    >>> ActivationQuant()(torch.tensor([[127.0, 0.4]])).tolist()
    [[127.0, 0.0]]
    """

    bits: int = 8
    scale: float | None = None
    zero: int = 0

    def __call__(self, x: Tensor, last: int = 1) -> Tensor:
        """Return x rounded; dynamic ones share a scale over so many `last` dimensions."""
        high = (1 << (self.bits - 1)) - 1
        with torch.no_grad():
            if self.scale is None:
                over = tuple(range(x.dim() - min(last, x.dim()), x.dim()))
                step = x.detach().float().abs().amax(over, keepdim=True) / high
                step = torch.where(step > MIN_SCALE, step, 1.0)
                value = (x.detach().float() * (1 / step)).round_().clamp_(-high, high) * step
                inside = None
            else:
                code = (x.detach().float() / self.scale).round_() + self.zero
                inside = (code >= 0) & (code <= 2 * high + 1)
                value = (code.clamp_(0, 2 * high + 1) - self.zero) * self.scale
            value = value.to(x.dtype)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return value
        through = x if inside is None else torch.where(inside, x, x.detach())
        return StraightThrough.apply(through, value)  # type: ignore[return-value]

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Round what a module is called with."""
        kernel: Any = getattr(module, "kernel_size", None)
        last = 1 if kernel is None else len(kernel) + 1  # an image with its channels, in a batch or alone
        if args:
            return (self(args[0], last), *args[1:]), kwargs
        first = next(iter(kwargs))
        return args, {**kwargs, first: self(kwargs[first], last)}


def get_activation_quant(module: nn.Module) -> ActivationQuant | None:
    """Return how a module's inputs are rounded, or None."""
    return module.__dict__.get(NOTE)


def set_activation_quant_(module: nn.Module, inputs: ActivationQuant | None) -> None:
    """Round a module's inputs so from here on, or no more."""
    for key in [k for k, h in module._forward_pre_hooks.items() if is_quant_hook(h)]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    module.__dict__.pop(NOTE, None)
    if inputs is not None:
        module.__dict__[NOTE] = inputs
        module.register_forward_pre_hook(inputs.hook, with_kwargs=True)


def is_quant_hook(hook: Any) -> bool:
    """Whether a hook is one that rounds."""
    return isinstance(getattr(hook, "__self__", None), ActivationQuant)


@contextmanager
def suspended(model: nn.Module) -> Iterator[frozenset[str]]:
    """Run with the inputs of Linear layers as they are where they are rounded dynamically, for kernels that round them.

    Yields:
        The names of these layers. Their hooks come back at the end.
    """
    dynamic = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and _is_dynamic(m)}
    inputs = {n: get_activation_quant(m) for n, m in dynamic.items()}
    try:
        for module in dynamic.values():
            set_activation_quant_(module, None)
        yield frozenset(dynamic)
    finally:
        for name, module in dynamic.items():
            set_activation_quant_(module, inputs[name])


def _is_dynamic(module: nn.Module) -> bool:
    inputs = get_activation_quant(module)
    return inputs is not None and inputs.scale is None


def activation_quants(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return {module: how its inputs are rounded} as plain data."""
    return {n: asdict(found) for n, m in model.named_modules() if (found := get_activation_quant(m)) is not None}


def restore_activation_quants_(model: nn.Module, told: Any, path: Any) -> None:
    """Round inputs as a file says; ContainerError for what does not fit."""
    if not isinstance(told, Mapping):
        raise ContainerError(f"{path}: what it says of inputs must be an object, got {type(told).__name__}")
    modules = dict(model.named_modules())
    for name, how in told.items():
        sound = isinstance(how, Mapping) and set(how) == {"bits", "scale", "zero"} and type(how["bits"]) is int
        sound = sound and how["bits"] == 8 and type(how["zero"]) is int and 0 <= how["zero"] < 1 << how["bits"]
        sound = sound and ((how["scale"] is None and how["zero"] == 0) or _is_scale(how["scale"]))
        if not sound or not has_quantizable_input(modules.get(name)):
            raise ContainerError(f"{path}: inputs of {str(name)[:80]!r} cannot be rounded as it says, {str(how)[:80]}")
    for name in {*activation_quants(model)} - {*told}:
        set_activation_quant_(modules[name], None)
    for name, how in told.items():
        set_activation_quant_(modules[name], ActivationQuant(**how))


def _is_scale(value: Any) -> bool:
    return type(value) is float and 0 < value < float("inf")


def has_quantizable_input(module: Any) -> bool:
    """Whether a module is one whose first argument its weight multiplies."""
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or is_hf_conv1d(module)
