"""Keep an optimizer valid after a cut: replace its parameters and slice its state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.common.errors import ModelError

Replaced = Iterable[tuple[Tensor, Tensor, Mapping[int, Tensor]]]  # old, new, indices kept by dimension


def check_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Raise ModelError for an object that is no optimizer of this model, or whose state cannot be sliced.

    State of a parameter must be numbers, or tensors of the parameter's shape.
    """
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ModelError(f"optimizer: expected a torch.optim.Optimizer, got {optimizer!r}")
    parameters = {id(p) for p in model.parameters()}
    if not any(id(p) in parameters for g in optimizer.param_groups for p in g["params"]):
        raise ModelError(f"optimizer holds no parameter of this {type(model).__name__}")
    for p, state in optimizer.state.items():
        for name, value in state.items():
            number = (
                value is None or isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)
            )
            if not number and not (isinstance(value, Tensor) and value.shape == p.shape):
                raise ModelError(
                    f"{type(optimizer).__name__} keeps {name!r}, which does not have the shape of its parameter: "
                    "cut without optimizer=, then create a new one"
                )


def replace_parameters(optimizer: torch.optim.Optimizer, replaced: Replaced) -> None:
    """Replace cut parameters in an optimizer, each with the state of the slices that stay."""
    new_of = {id(old): (new, kept_of) for old, new, kept_of in replaced}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            if id(p) not in new_of:
                continue
            new, kept_of = new_of[id(p)]
            group["params"][i] = new
            if p in optimizer.state:
                state = optimizer.state.pop(p)
                optimizer.state[new] = {k: _slice_state(v, p, kept_of) for k, v in state.items()}


def remove_parameters(optimizer: torch.optim.Optimizer, removed: set[int]) -> None:
    """Remove parameters from an optimizer, by their ids."""
    for group in optimizer.param_groups:
        for p in [p for p in group["params"] if id(p) in removed]:
            optimizer.state.pop(p, None)
        group["params"] = [p for p in group["params"] if id(p) not in removed]


def _slice_state(value: Any, old: Tensor, kept_of: Mapping[int, Tensor]) -> Any:
    """Return the slices of a state tensor that stay; other values unchanged."""
    if isinstance(value, Tensor) and value.shape == old.shape and value.dim():
        for d, indices in kept_of.items():
            value = value.index_select(d, indices.to(value.device))
    return value
