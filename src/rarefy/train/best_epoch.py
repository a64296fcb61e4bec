"""The weights of the best epoch of a training."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from rarefy.common.errors import ModelError


class BestEpoch:
    """The weights of the best epoch so far."""

    def __init__(self, model: nn.Module, maximize: bool):
        self.model, self.sign = model, 1 if maximize else -1
        self.metric: float | None = None
        self.epoch, self.waited = 0, 0
        self.state: dict[str, Any] = {}

    def offer(self, metric: float, epoch: int) -> None:
        """Copy the weights where the metric is better than before; ModelError where it is not finite."""
        if not math.isfinite(metric):
            raise ModelError(f"the validation metric is {metric} in epoch {epoch}")
        self.waited += 1
        if self.metric is None or self.sign * metric > self.sign * self.metric:
            self.metric, self.epoch, self.waited = metric, epoch, 0
            self.state = copy.deepcopy(self.model.state_dict())

    def restore(self) -> dict[str, Any]:
        """Load the best weights into the model; return their metric and epoch."""
        if self.metric is None:
            return {}
        self.model.load_state_dict(self.state)
        return {"best_metric": self.metric, "best_epoch": self.epoch}

    def to_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {**self.state, "-metric": self.metric, "-epoch": self.epoch, "-waited": self.waited}

    def load(self, values: Mapping[str, Any]) -> None:
        """Take up the state of a checkpoint."""
        self.metric, self.epoch, self.waited = (values[f"-{k}"] for k in ("metric", "epoch", "waited"))
        self.state = {k: v for k, v in values.items() if not k.startswith("-")}
