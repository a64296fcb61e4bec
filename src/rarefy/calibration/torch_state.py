"""Keep and set torch's own state, so that a suspended pass finds it as it left it."""

from __future__ import annotations

from typing import Any

import torch


def torch_state() -> tuple[Any, ...]:
    """Return torch's state: gradient mode, autocast, and the random numbers of the CPU."""
    cast = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_autocast_cache_enabled(), cast, torch.get_rng_state()


def set_torch_state(state: tuple[Any, ...]) -> None:
    """Set what `torch_state` returned."""
    grad, cache, cast, numbers = state
    torch.set_grad_enabled(grad)
    torch.set_rng_state(numbers)
    torch.set_autocast_cache_enabled(cache)
    for device, (on, dtype) in zip(("cpu", "cuda"), cast):
        torch.set_autocast_enabled(device, on)
        torch.set_autocast_dtype(device, dtype)
