"""What native calls need: tensors with memory of their own, and torch without modes that change its functions."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from rarefy.common.errors import DataError

P = ParamSpec("P")
R = TypeVar("R")


def address(t: Tensor) -> int:
    """Return the address of a tensor's values.

    Raises:
        DataError: it has none, as tensors of FakeTensorMode, torch.func and some subclasses do.
    """
    at = t.data_ptr()
    if not at and t.numel():
        got = f"{type(t).__name__} {list(t.shape)} without memory"
        raise DataError(f"expected tensors with values in memory, got a {got}: call the model outside of torch's modes")
    return at


def without_modes(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function that runs without autocast, a default device and other modes and subclasses of torch.

    Native code reads and writes memory, so a mode that makes torch return other types or devices would have it read
    other tensors than those that it was compiled for. About a microsecond a call.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch._C.DisableTorchFunction():
            if not torch.is_autocast_enabled("cpu"):
                return function(*args, **kwargs)
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)

    return run
