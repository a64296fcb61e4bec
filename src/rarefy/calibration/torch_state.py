"""Keep and set torch's own state, so that a suspended pass finds it as it left it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class TorchState:
    """Modes of torch and the random numbers of the CPU.

    Args:
        grad: whether gradients are recorded.
        autocast_cache: whether autocast keeps converted weights.
        autocast: for each of `DEVICES`, whether autocast is on, and its dtype.
        random: the state of the CPU's random numbers.
    """

    grad: bool
    autocast_cache: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]
    random: Tensor


def torch_state() -> TorchState:
    """Return torch's state as it is now."""
    return TorchState(
        grad=torch.is_grad_enabled(),
        autocast_cache=torch.is_autocast_cache_enabled(),
        autocast=tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in DEVICES),
        random=torch.get_rng_state(),
    )


def set_torch_state(state: TorchState) -> None:
    """Set torch's state to what `torch_state` returned."""
    torch.set_grad_enabled(state.grad)
    torch.set_rng_state(state.random)
    torch.set_autocast_cache_enabled(state.autocast_cache)
    for device, (on, dtype) in zip(DEVICES, state.autocast):
        torch.set_autocast_enabled(device, on)
        torch.set_autocast_dtype(device, dtype)
