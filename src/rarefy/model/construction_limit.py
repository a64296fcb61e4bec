"""A limit on what a configuration may make a library build: as many tensors, and elements, as its files explain.

A number in a config.json of some hundred bytes can ask for a million layers, or for a matrix of terabytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from rarefy.common.errors import ModelError
from rarefy.common.plain_file import plain_file

TENSORS = 300, 8  # that any model may have, and for each stored one: also those that are made and dropped
ELEMENTS = 1 << 26, 64  # the same, and for each stored byte: sparse files are smaller than their tensors
OF_SIZES = frozenset(
    (
        *(torch.empty, torch.empty_strided, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn),
        *(torch.randint, torch.arange, torch.range, torch.linspace, torch.eye),
    )
)


class Stored(NamedTuple):
    """How many tensors the files of a model hold, and their bytes."""

    tensors: int
    bytes: int


def stored_in(folder: Path) -> Stored:
    """Return what the safetensors files of a folder and its folders hold; safetensors' own errors for damaged ones.

    Cost: O(tensors).
    """
    from safetensors import safe_open

    files, tensors = list(folder.rglob("*.safetensors")), 0
    for file in files:
        with safe_open(plain_file(file), "pt") as opened:
            tensors += len(opened.keys())
    return Stored(tensors, sum(f.stat().st_size for f in files))


class ConstructionLimit(TorchFunctionMode):
    """A context that counts the tensors that are made in it, and raises ModelError for too many."""

    def __init__(self, stored: Stored, where: str | Path = ""):
        """Allow what files with these tensors explain; errors name `where` they are."""
        super().__init__()
        self.stored, self.where = stored, where
        self.tensors = TENSORS[0] + TENSORS[1] * stored.tensors
        self.elements = ELEMENTS[0] + ELEMENTS[1] * stored.bytes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch; count its result if it makes a tensor of sizes."""
        kwargs = kwargs or {}
        if func in OF_SIZES:
            self.tensors -= 1
            self.elements -= func(*args, **{**kwargs, "device": "meta"}).numel()
            if self.tensors < 0 or self.elements < 0:
                what = "tensors" if self.tensors < 0 else "elements"
                problem = (
                    f"its config describes a model of far more {what} than its files explain, which hold "
                    f"{self.stored.tensors} tensors: the config is damaged, or of another model"
                )
                raise ModelError(f"{self.where}: {problem}" if self.where else problem)
        return func(*args, **kwargs)
