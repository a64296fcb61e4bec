"""Attaching parametrizations to a parameter and removing them; the parameter keeps its identity and its position."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from rarefy.model.layers import original

PARAMETER_ORDER = "rarefy_order"  # attribute: a module's parameter names in order, while some are parametrized


def attach_(module: nn.Module, param: str, parametrization: nn.Module) -> None:
    """Attach a parametrization to `module.param`."""
    if not parametrize.is_parametrized(module):
        module.__dict__[PARAMETER_ORDER] = list(module._parameters)
    parametrize.register_parametrization(module, param, parametrization)


def detach_(module: nn.Module, param: str) -> None:
    """Remove all parametrizations from `module.param`; the underlying parameter keeps its values.

    The parameters return to their former order, because the state of an optimizer refers to them by position.
    """
    parameter = original(module, param)
    cls = type(module)  # copies of a module share its class, from which torch would remove the property
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, namespace)  # type: ignore[assignment]
    parametrize.remove_parametrizations(module, param, leave_parametrized=False)
    # torch sets a new parameter; a tied weight must stay the shared one
    setattr(module, param, parameter)
    parameters = module._parameters
    for name in module.__dict__.get(PARAMETER_ORDER, ()):
        if name in parameters:
            parameters[name] = parameters.pop(name)
    if not parametrize.is_parametrized(module):
        module.__dict__.pop(PARAMETER_ORDER, None)
