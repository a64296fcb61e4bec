"""The places of a model's modules: replace one, fuse one away, put all of them back."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from rarefy.runtime.fusion_analysis import Observed


class ModuleSlots:
    """Where a model's modules are, by the names that they had at first.

    Attributes:
        model: the model.
        observed: what an example showed of it; empty without one.
        has_example: whether there is one.
        names, uses, parents: of the model as it was: name and number of places by the id of a module, parent by name.
    """

    def __init__(self, model: nn.Module, observed: Observed | None, fold: bool):
        self.model, self.observed = model, observed or Observed({}, {})
        self.has_example, self._fold = observed is not None, fold
        self._replaced: list[tuple[str, nn.Module]] = []  # (name, module that was there), in order
        self.names = {id(m): name for name, m in model.named_modules()}
        self.uses = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        self.parents = {f"{name}.{child}".lstrip("."): m for name, m in model.named_modules() for child in m._modules}

    def consumer(self, module: nn.Module) -> Any:
        """Return the BatchNorm or activation that may be fused into the module before it, or None."""
        consumer = self.observed.consumers.get(id(module))
        return consumer if self._fold and consumer is not None and self.uses[id(consumer)] == 1 else None

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a module in the place of that name."""
        parent, _, leaf = name.rpartition(".")
        self._replaced.append((name, self.model.get_submodule(name)))
        setattr(self.model.get_submodule(parent), leaf, module)

    def remove(self, module: nn.Module) -> str:
        """Leave an Identity in a module's place; return its name."""
        self.replace(self.names[id(module)], nn.Identity())
        return self.names[id(module)]

    def undo(self) -> None:
        """Put every module back."""
        for name, module in reversed(self._replaced.copy()):
            self.replace(name, module)
        self._replaced.clear()
