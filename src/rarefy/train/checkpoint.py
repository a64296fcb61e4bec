"""The saved state of a training run, from which a killed run resumes bit for bit.

One file, `training.safetensors`, is replaced atomically. It holds the tensors of the model, the best epoch, the
optimizer and the sparsifier, and the random state at the start of the epoch and now; numbers are JSON in its header.
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
from rarefy.common.atomic_io import TRAINING_FILE
from rarefy.common.errors import ModelError

EVERY = 60.0  # seconds between two states


@dataclass
class State:
    """The numbers and tensors of a run at one moment."""

    numbers: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Add a flat dict of tensors and numbers under a prefix."""
        tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
        self.numbers[prefix] = {k: v for k, v in values.items() if k not in tensors}
        # clones: tied tensors are stored separately, and none may change while it is written
        self.tensors.update({f"{prefix}/{k}": v.detach().contiguous().clone() for k, v in tensors.items()})

    def get(self, prefix: str) -> dict[str, Any]:
        """Return the dict that was added under a prefix."""
        tensors = {k.removeprefix(f"{prefix}/"): v for k, v in self.tensors.items() if k.startswith(f"{prefix}/")}
        return {**self.numbers.get(prefix, {}), **tensors}


def save(resume_state: ResumeState, state: State) -> None:
    """Write a state, in place of the last one. Raises ContainerError where there is no space."""
    resume_state.write_tensors(TRAINING_FILE, state.tensors, "numbers", state.numbers)


def load(resume_state: ResumeState) -> State | None:
    """Return the saved state, or None. Raises ContainerError for a damaged file or another run."""
    if resume_state.folder is None or not (resume_state.folder / TRAINING_FILE).is_file():
        return None
    tensors, numbers = resume_state.read_tensors(TRAINING_FILE, "numbers")
    return State(numbers, tensors)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state of an optimizer as a flat dict of tensors and numbers."""
    state = optimizer.state_dict()
    flat: dict[str, Any] = {}
    for index, values in state["state"].items():
        flat.update({f"{index}.{k}": v for k, v in values.items()})
    groups = [{k: v for k, v in g.items() if k == "lr" or k == "initial_lr"} for g in state["param_groups"]]
    return {**flat, "groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, flat: Mapping[str, Any]) -> None:
    """Load such a state into an optimizer of the same parameters."""
    state = optimizer.state_dict()
    by_index: dict[int, dict[str, Any]] = {}
    for key, value in flat.items():
        if key != "groups":
            index, _, name = key.partition(".")
            by_index.setdefault(int(index), {})[name] = value
    groups = [{**g, **saved} for g, saved in zip(state["param_groups"], flat["groups"])]
    optimizer.load_state_dict({"state": by_index, "param_groups": groups})


def random_state() -> dict[str, Any]:
    """Return the state of torch's and Python's random generators."""
    version, numbers, gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "python": [version, list(numbers), gauss]}
    if torch.cuda.is_available():
        state |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    for name in (n for n in state if n.startswith("cuda.")):
        torch.cuda.set_rng_state(state[name], int(name.removeprefix("cuda.")))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors into a model of the same structure, dtypes unchanged. Raises ModelError for another structure."""
    current = model.state_dict()
    if set(current) != set(tensors) or any(current[n].shape != t.shape for n, t in tensors.items()):
        raise ModelError("the saved training state belongs to a model of another structure")
    with torch.no_grad():
        for name, tensor in tensors.items():
            current[name].copy_(tensor)


class Clock:
    """Says when the next state is due."""

    def __init__(self, every: float | None = None):
        self.every, self.last = EVERY if every is None else every, time.monotonic()

    def due(self) -> bool:
        """Return whether `every` seconds have passed since this last returned True."""
        if time.monotonic() - self.last < self.every:
            return False
        self.last = time.monotonic()
        return True
