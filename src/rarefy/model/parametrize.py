"""Parametrizations on and off a parameter, which keeps its identity and its place among the module's others."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from rarefy.model.layers import original

PARAMETER_ORDER = "rarefy_order"  # names of a module's parameters, while some are parametrized


def attach_(module: nn.Module, param: str, made: nn.Module) -> None:
    """Put a parametrization on `module.param`."""
    if not parametrize.is_parametrized(module):
        module.__dict__[PARAMETER_ORDER] = list(module._parameters)
    parametrize.register_parametrization(module, param, made)


def detach_(module: nn.Module, param: str) -> None:
    """Take all parametrizations off `module.param`; the parameter beneath stays as it is, and parameters are in the
    order of before again, by which states of optimizers go."""
    keep = original(module, param)
    kind = type(module)  # torch gives a copy of a module the same class, and takes the weight off that
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, kind.__bases__, own)  # type: ignore[assignment]
    parametrize.remove_parametrizations(module, param, leave_parametrized=False)
    # remove_parametrizations hands back a parameter; with tied weights it must be the shared one
    setattr(module, param, keep)
    held = module._parameters
    for name in module.__dict__.get(PARAMETER_ORDER, ()):
        if name in held:
            held[name] = held.pop(name)
    if not parametrize.is_parametrized(module):
        module.__dict__.pop(PARAMETER_ORDER, None)
