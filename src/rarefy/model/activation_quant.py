"""Quantized activations: the inputs of a layer are rounded to 8 bits before the layer sees them.

The scale is either static (fixed by calibration) or dynamic (computed in each call). Gradients pass straight through
the rounding. How a module's inputs are rounded is kept as plain data in its attribute `rarefy_input`, with a forward
pre-hook that applies it. Both are copied with the module, and `save` stores the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ContainerError
from rarefy.model.layout import is_hf_conv1d
from rarefy.model.quant_grid import StraightThrough

NOTE = "rarefy_input"
MIN_SCALE = 1e-36  # below it, 1 / scale would be infinite
_operator: ContextVar[Callable[[Tensor, float, int], Tensor] | None] = ContextVar("operator", default=None)


@dataclass(frozen=True)
class ActivationQuant:
    """How the inputs of a layer are rounded.

    bits   bits of a code
    scale  static: one scale for all inputs, where `zero` is the code of 0 in 0..2^bits - 1; None: dynamic and
           symmetric, a scale for each row of a Linear's inputs or for each image of a convolution's inputs

    >>> ActivationQuant(8, 0.5, 0)(torch.tensor([0.2, 1.4, -3.0])).tolist()
    [0.0, 1.5, 0.0]
    >>> ActivationQuant()(torch.tensor([[127.0, 0.4]])).tolist()
    [[127.0, 0.0]]
    """

    bits: int = 8
    scale: float | None = None
    zero: int = 0

    def __call__(self, x: Tensor, num_dims: int = 1) -> Tensor:
        """Return x rounded. A dynamic scale is shared over the last `num_dims` dimensions."""
        if self.scale is not None and self.bits == 8 and (operator := _operator.get()) is not None:
            return operator(x, self.scale, self.zero)
        max_code = (1 << (self.bits - 1)) - 1
        with torch.no_grad():
            if self.scale is None:
                dims = tuple(range(x.dim() - min(num_dims, x.dim()), x.dim()))
                scale = x.detach().float().abs().amax(dims, keepdim=True) / max_code
                scale = torch.where(scale > MIN_SCALE, scale, 1.0)
                value = (x.detach().float() * (1 / scale)).round_().clamp_(-max_code, max_code) * scale
                in_range = None
            else:
                code = (x.detach().float() / self.scale).round_() + self.zero
                in_range = (code >= 0) & (code <= 2 * max_code + 1)
                value = (code.clamp_(0, 2 * max_code + 1) - self.zero) * self.scale
            value = value.to(x.dtype)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return value
        passing = x if in_range is None else torch.where(in_range, x, x.detach())
        return StraightThrough.apply(passing, value)  # type: ignore[return-value]

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Round the first argument of a module's call."""
        kernel: Any = getattr(module, "kernel_size", None)
        num_dims = 1 if kernel is None else len(kernel) + 1  # an image with its channels, batched or not
        if args:
            return (self(args[0], num_dims), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: self(kwargs[name], num_dims)}


@contextmanager
def rounding_by(operator: Callable[[Tensor, float, int], Tensor]) -> Iterator[None]:
    """Let one operator of (x, scale, zero) round to static grids of 8 bits: an export records it as one call."""
    token = _operator.set(operator)
    try:
        yield
    finally:
        _operator.reset(token)


def get_activation_quant(module: nn.Module) -> ActivationQuant | None:
    """Return how a module's inputs are rounded, or None if they are not."""
    return module.__dict__.get(NOTE)


def set_activation_quant_(module: nn.Module, inputs: ActivationQuant | None) -> None:
    """Quantize a module's inputs in every call from now on; None turns it off."""
    for key in [k for k, h in module._forward_pre_hooks.items() if is_quant_hook(h)]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)
    module.__dict__.pop(NOTE, None)
    if inputs is not None:
        module.__dict__[NOTE] = inputs
        module.register_forward_pre_hook(inputs.hook, with_kwargs=True)


def is_quant_hook(hook: Any) -> bool:
    """Return whether a forward pre-hook is one that rounds inputs."""
    return isinstance(getattr(hook, "__self__", None), ActivationQuant)


@contextmanager
def suspended(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)) -> Iterator[frozenset[str]]:
    """Run with the inputs of layers as they are where they are rounded dynamically, for kernels that round them.

    Args:
        model: the model; nobody else may call it meanwhile.
        kinds: the classes of these layers.

    Yields:
        The names of these layers. Their hooks come back at the end.
    """
    dynamic = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and _is_dynamic(m)}
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
    """Return {module name: how its inputs are rounded} as plain data."""
    return {n: asdict(quant) for n, m in model.named_modules() if (quant := get_activation_quant(m)) is not None}


def restore_activation_quants_(model: nn.Module, saved: Any, path: Any) -> None:
    """Restore the input quantization of a saved file; ContainerError if it does not fit the model."""
    if not isinstance(saved, Mapping):
        raise ContainerError(f"{path}: expected an object that describes rounded inputs, got {type(saved).__name__}")
    modules = dict(model.named_modules())
    for name, options in saved.items():
        valid = (
            isinstance(options, Mapping) and set(options) == {"bits", "scale", "zero"} and type(options["bits"]) is int
        )
        valid = (
            valid
            and options["bits"] == 8
            and type(options["zero"]) is int
            and 0 <= options["zero"] < 1 << options["bits"]
        )
        valid = valid and ((options["scale"] is None and options["zero"] == 0) or _is_scale(options["scale"]))
        if not valid or not has_quantizable_input(modules.get(name)):
            raise ContainerError(
                f"{path}: inputs of {str(name)[:80]!r} cannot be rounded as described: {str(options)[:80]}"
            )
    for name in {*activation_quants(model)} - {*saved}:
        set_activation_quant_(modules[name], None)
    for name, options in saved.items():
        set_activation_quant_(modules[name], ActivationQuant(**options))


def _is_scale(value: Any) -> bool:
    return type(value) is float and 0 < value < float("inf")


def has_quantizable_input(module: Any) -> bool:
    """Return whether a module multiplies its first argument by its weight."""
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) or is_hf_conv1d(module)
