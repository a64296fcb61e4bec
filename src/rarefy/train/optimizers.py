"""Optimizers and learning rate schedules by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from rarefy.common.errors import RecipeError, unknown

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
# factor of the learning rate at progress t, 0 to 1
LR_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "one-cycle": lambda t: 0.05 + 0.95 * t / 0.25 if t < 0.25 else (1 + math.cos(math.pi * (t - 0.25) / 0.75)) / 2,
}


def optimizer_of(name: str, lr: float, **options: Any) -> MakeOptimizer:
    """Return a function that makes the named optimizer. Raises RecipeError for an unknown name or option.

    >>> optimizer_of("sgd", 0.1, momentum=0.9)([nn.Parameter(torch.zeros(1))]).defaults["momentum"]
    0.9
    """
    if name not in OPTIMIZERS:
        raise RecipeError(unknown("optimizer", name, OPTIMIZERS))
    try:
        OPTIMIZERS[name]([nn.Parameter(torch.zeros(1))], lr=lr, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"optimizer {name!r} cannot be made with lr={lr}, {options}: {error}") from None
    return lambda parameters: OPTIMIZERS[name](parameters, lr=lr, **options)
