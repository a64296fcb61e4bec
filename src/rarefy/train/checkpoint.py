"""Where a training run stands, on disk, so that a killed run goes on with the same bits.

One file, `training.safetensors`, replaced whole: every tensor of the model, of the best epoch, of the optimizer and of
the sparsifier, the state of torch's random numbers at the epoch's start and now; numbers as JSON in its header.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.calibration.resume import ResumeState
from rarefy.common.atomic_io import TRAINING
from rarefy.common.errors import ModelError

EVERY = 60.0  # seconds between two states


@dataclass
class State:
    """Numbers and tensors of a run at one moment."""

    numbers: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def put(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Add a flat dict of tensors and numbers under a prefix."""
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        self.numbers[prefix] = {k: v for k, v in values.items() if k not in tensors}
        # clones: tied tensors are stored once each, and none may change while it is written
        self.tensors.update({f"{prefix}/{k}": v.detach().contiguous().clone() for k, v in tensors.items()})

    def get(self, prefix: str) -> dict[str, Any]:
        """Return what was put under a prefix."""
        own = {k.removeprefix(f"{prefix}/"): v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")}
        return {**self.numbers.get(prefix, {}), **own}


def save(resume_state: ResumeState, state: State) -> None:
    """Put a state on disk in place of the one before; ContainerError where there is no space."""
    resume_state.write_tensors(TRAINING, state.tensors, "numbers", state.numbers)


def load(resume_state: ResumeState) -> State | None:
    """Return the state on disk, or None; ContainerError where it is damaged or of another run."""
    if resume_state.folder is None or not (resume_state.folder / TRAINING).is_file():
        return None
    tensors, numbers = resume_state.read_tensors(TRAINING, "numbers")
    return State(numbers, tensors)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return an optimizer's state as a flat dict of tensors and numbers."""
    state = optimizer.state_dict()
    flat: dict[str, Any] = {}
    for index, values in state["state"].items():
        flat.update({f"{index}.{k}": v for k, v in values.items()})
    groups = [{k: v for k, v in g.items() if k == "lr" or k == "initial_lr"} for g in state["param_groups"]]
    return {**flat, "groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, Any]) -> None:
    """Put such a state into an optimizer of the same parameters."""
    state = optimizer.state_dict()
    found: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        if key != "groups":
            index, _, name = key.partition(".")
            found.setdefault(int(index), {})[name] = value
    groups = [{**g, **had} for g, had in zip(state["param_groups"], flat["groups"])]
    optimizer.load_state_dict({"state": found, "param_groups": groups})


def random_state() -> dict[str, Any]:
    """Return the state of torch's and of Python's random numbers."""
    version, words, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [version, list(words), gauss]}
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    for name in (n for n in state if n.startswith("cuda.")):
        torch.cuda.set_rng_state(state[name], int(name.removeprefix("cuda.")))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put a state into a model of the same structure, dtypes as they are; ModelError where it has another one."""
    here = model.state_dict()
    if set(here) != set(tensors) or any(here[n].shape != t.shape for n, t in tensors.items()):
        raise ModelError("the state of training is of a model of another structure")
    with torch.no_grad():
        for name, tensor in tensors.items():
            here[name].copy_(tensor)


class Clock:
    """Whether it is time for another state."""

    def __init__(self, every: float | None = None):
        self.every, self.last = EVERY if every is None else every, time.monotonic()

    def due(self) -> bool:
        """Return whether `every` seconds have passed since this last returned True."""
        if time.monotonic() - self.last < self.every:
            return False
        self.last = time.monotonic()
        return True
